import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm_train.training.tracking import last_values
from cm_train.training.tracking.metrics_file import MetricsFile
from cm_train.training.tracking.names import group, shown
from cm_train.training.tracking.tensorboard import TensorBoard
from conftest import TINY, wait_for


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (2, 4, 6, 8)))
    file = MetricsFile(path, 4)
    file.write({"step": 6, "again": True})
    file.sync()
    file.close()
    assert rows(path) == [{"step": 2}, {"step": 4}, {"step": 6, "again": True}]


def test_a_torn_last_line_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for torn in ('{"step": 4, "lo', '{"step": 4}', "\x00\x00", '"text"\n', "[1]\n"):
        path.write_text('{"step": 2}\n' + torn)
        MetricsFile(path, 100).close()
        assert rows(path) == [{"step": 2}], torn


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n')
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def test_metrics_line_that_does_not_fit_on_the_disk_is_written_whole_later(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 2})
    real = file._file

    class Full:
        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, line):
            return real.write(line[:5])

    file._file = Full()
    with pytest.raises(OSError, match="No space"):
        file.write({"step": 4})
    file._file = real
    file.write({"step": 6})
    file.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 2}, {"step": 4}, {"step": 6}]


def test_last_values_are_the_newest_of_each_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_values(path) == {}
    path.write_text('{"step": 2, "loss": 9.0, "measure": 1}\n{"step": 4, "loss": null}\n[1]\n{"step": 6, "lo')
    assert last_values(path) == {"step": 4, "loss": 9.0, "measure": 1}


def test_every_name_has_its_group():
    groups = {
        None: ["step", "images", "epoch"],
        "train": ["loss", "distance", "grad_norm", "lr", "num_scales", "skipped_share", "update_ratio", "loss_band_7"],
        "perf": ["images_per_s", "steps_per_s", "time_s", "memory_gib"],
        "preview": ["agreement_rms", "agreement_std_ratio", "samples"],
    }
    assert {name: group(name) for names in groups.values() for name in names} == {
        name: found for found, names in groups.items() for name in names
    }
    assert (shown("loss"), shown("samples"), shown("step")) == ("train/loss", "preview/samples", "step")


# ------------------------------------------------------------------------------------------------------- TensorBoard


def events(run):
    """As TensorBoard itself reads a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_tensorboard_holds_what_metrics_hold_and_no_step_twice_after_a_resume(command, tmp_path):
    """The run loses its newest checkpoint, as by a crash, and repeats the steps that event files have already."""
    arguments = ["mode=ict", *TINY[1:], "tracking=tensorboard", "preview_every=2"]
    assert command("train", *arguments).returncode == 0
    run = tmp_path / "runs" / "digits-ict"
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    done = command("train", *arguments, "steps=8")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 3" in done.stderr
    assert f"tensorboard --logdir {Path('runs/digits-ict/tensorboard')}" in done.stderr

    found, written = events(run), rows(run / "metrics.jsonl")
    names = {name for row in written for name in row} - {"step"}
    assert set(found.Tags()["scalars"]) == {shown(name) for name in names}
    for name in names:
        expected = [(row["step"], row[name]) for row in written if name in row]  # a band may have had no image
        assert [e.step for e in found.Scalars(shown(name))] == [step for step, _ in expected], name
        values = [value for _, value in expected]
        assert [e.value for e in found.Scalars(shown(name))] == pytest.approx(values, rel=1e-6), name
    assert [row["step"] for row in written] == [e.step for e in found.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [e.step for e in found.Images("preview/samples")] == [2, 4, 6, 8]
    for image in found.Images("preview/samples"):
        sent = Image.open(io.BytesIO(image.encoded_image_string))
        kept = Image.open(run / "samples" / f"step_{image.step:08d}.png")
        assert np.array_equal(np.asarray(sent), np.asarray(kept.convert("RGB")))
    (text, later) = found.Tensors("config/text_summary")
    assert "steps: 6" in text.tensor_proto.string_val[0].decode()
    assert "steps: 8" in later.tensor_proto.string_val[0].decode()


def test_tensorboard_that_is_not_installed_is_told_before_a_teacher_trains(warm, tmp_path):
    without = "import sys; sys.modules['tensorboard'] = None; from cm_train.commands.train import main; main()"
    done = warm.run(["-c", without, "mode=cd", *TINY[1:], "tracking=tensorboard"], cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'cm-train[tensorboard]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs" / "digits-edm").exists()


def test_tensorboard_that_cannot_write_ends_no_run(command, tmp_path):
    run = tmp_path / "runs" / "digits-ict"
    assert command("train", "mode=ict", *TINY, "steps=2", "schedule_steps=6").returncode == 0
    (run / "tensorboard").write_text("in the way")
    done = command("train", "mode=ict", *TINY[1:], "tracking=tensorboard")
    assert done.returncode == 0, done.stderr
    assert "tensorboard is off: FileExistsError" in done.stderr
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [2, 4, 6]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk_blocks_nothing(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    tracker = TensorBoard(tmp_path, {"a": 1}, 0)
    tracker.log({"step": 1, "loss": 1.0})
    wait_for(lambda: tracker._queue.empty() and list(tmp_path.glob("tensorboard/*")))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    start = time.monotonic()
    for step in range(2, 100):
        tracker.log({"step": step, "loss": 1.0})
    tracker.close()
    assert time.monotonic() - start < 20
    first, second = capsys.readouterr().err.splitlines()
    assert first == "tensorboard: OSError: [Errno 28] No space left on device"
    assert second.endswith("tensorboard any more; metrics.jsonl has everything")
