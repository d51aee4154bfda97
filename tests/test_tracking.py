import json
import os
import subprocess
import sys
import threading
import time

import pytest

from cm_train.tracking import TrackingConfig
from cm_train.tracking.metrics_file import MetricsFile
from cm_train.tracking.training_progress import TrainingProgress
from cm_train.tracking.wandb_run import Wandb
from conftest import ENVIRONMENT, TINY


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


def test_terminal_prints_plain_lines_where_there_is_no_terminal(capsys):
    terminal = TrainingProgress(total=10, start=0, every_s=0.0)
    terminal.step(5)
    terminal.values({"loss": 0.25, "images_per_s": 100.0, "steps_per_s": 2.0, "skipped": 1})
    terminal.close()
    assert capsys.readouterr().err == "step 5/10  loss 0.25  100 images/s  1 skipped  0:00:02 left\n"


def test_terminal_does_not_flood(capsys):
    terminal = TrainingProgress(total=1000, start=0, every_s=3600.0)
    for step in range(1, 1001):
        terminal.step(step)
        terminal.values({"loss": 0.5, "images_per_s": 1.0, "steps_per_s": 1.0})
    assert len(capsys.readouterr().err.splitlines()) == 2, "the first and the last"


def test_wandb_never_blocks_and_never_ends_a_run(tmp_path, monkeypatch, capsys):
    """A start that hangs, then fails, costs the caller nothing but a line."""
    release = threading.Event()

    def hang(*_):
        release.wait(30)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Wandb, "_start", staticmethod(hang))
    start = time.monotonic()
    tracker = Wandb(TrackingConfig(), tmp_path, "run", {})
    for step in range(1000):
        tracker.log({"step": step, "loss": 1.0})
    tracker.image("samples", tmp_path / "none.png", 5)
    tracker.patience_s = 0.1
    tracker.close()  # still hanging: given up, not waited for
    assert time.monotonic() - start < 20
    release.set()
    tracker.patience_s = 30.0
    tracker.close()
    assert capsys.readouterr().err == "wandb is off: ConnectionError: no route\n"


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


def test_wandb_without_a_login_goes_offline_and_keeps_previews(tmp_path):
    """No question asked, no network: scalars and pictures lie in the run folder, under one id across resumes."""
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": os.devnull}
    for steps in (4, 6):
        done = subprocess.run(
            [sys.executable, "-m", "cm_train.train", "mode=ict", *TINY[1:], f"steps={steps}", "preview_every=2"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits-ict"
    (identity,) = {p.name.split("-")[-1] for p in (run / "wandb").glob("offline-run-*")}
    assert identity == (run / "wandb_id").read_text().strip()
    pictures = [p.name for p in run.glob("wandb/offline-run-*/files/media/images/*.png")]
    assert sorted(int(name.split("_")[1]) for name in pictures) == [2, 4, 6]
    (first, *_) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"grad_norm" in first.read_bytes()
