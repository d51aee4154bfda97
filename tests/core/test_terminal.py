"""What a user sees while a command runs, on a terminal and elsewhere, and that --quiet leaves errors only."""

import io
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cm_train.core import progress as progress_bar
from cm_train.core import registry, terminal
from cm_train.core.progress import progress
from cm_train.core.terminal import begin_part, complain, duration, in_parts, part, say
from cm_train.core.world import World
from cm_train.runs import announce
from cm_train.runs import launch as launching
from cm_train.runs.config import parse
from cm_train.sweeps import gpus
from cm_train.training.tracking.training_progress import TrainingProgress
from conftest import ENVIRONMENT, TINY


class Screen(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """on_terminal() -> the Screen that takes stderr's place; called in the test, after pytest has set up its own."""

    def install(kind="xterm"):
        monkeypatch.setenv("TERM", kind)
        monkeypatch.setattr(sys, "stderr", Screen())
        return sys.stderr

    return install


@pytest.fixture
def lines_at_once(monkeypatch):
    monkeypatch.setattr(progress_bar, "EVERY_S", 0.0)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("CM_TRAIN_QUIET", "1")


# ------------------------------------------------------------------------------------------------------- progress


def test_training_prints_plain_lines_where_there_is_no_terminal(capsys):
    training = TrainingProgress(total=10, start=0, every_s=0.0)
    training.step(5)
    training.values({"loss": 0.25, "images_per_s": 100.0, "steps_per_s": 2.0, "skipped": 1})
    training.close()
    assert capsys.readouterr().err == "step 5/10  loss 0.25  100 images/s  1 skipped  0:00:02 left\n"


def test_training_tells_the_time_left_with_previews_and_saves(capsys):
    training = TrainingProgress(total=10, start=0, every_s=0.0)
    training.step(4)
    training.values({"loss": 0.25, "images_per_s": 100.0, "steps_per_s": 2.0}, beside_s=60.0)
    training.close()
    assert capsys.readouterr().err.endswith("  0:01:03 left\n")


def test_training_names_the_part_of_a_command_that_trains_two_runs(capsys):
    line = "step 5/10{}  loss 0.25  100 images/s  0:00:02 left\n"
    with in_parts():
        for label in ("1 of 2: the teacher", "2 of 2"):
            begin_part(label)
            training = TrainingProgress(total=10, start=0, every_s=0.0)
            training.step(5)
            training.values({"loss": 0.25, "images_per_s": 100.0, "steps_per_s": 2.0})
            training.close()
            assert capsys.readouterr().err == line.format(f" ({label})")
    assert part() == "", "the next run of this process may be the only one of its command"


def test_bar_tells_what_is_being_done_and_counts_down(on_terminal, monkeypatch):
    screen, clock = on_terminal(), [1000.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("COLUMNS", "100")

    def seen():
        """The line as it is now."""
        screen.truncate(0)
        bar.refresh()
        return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).split())

    with in_parts():
        begin_part("1 of 2: the teacher")
        training = TrainingProgress(total=100, start=0)
        bar = terminal.live_bars[-1]
        assert "training 0/100 (1 of 2: the teacher)" in seen()
        training.step(50)
        training.values({"loss": 0.25, "images_per_s": 100.0, "steps_per_s": 1.0}, beside_s=70.0)
        assert "training 50/100" in seen() and "loss 0.25 100 images/s 0:02:00 left" in seen()
        clock[0] += 20
        with training.doing("preview"):
            assert "preview 50/100" in seen() and "0:01:40 left" in seen()
        with training.doing("saving"):
            assert "saving 50/100" in seen()
        assert "training 50/100" in seen()
        clock[0] += 1000
        assert "0:00:00 left" in seen(), "it is late, not done before now"
        training.close()


def test_bar_on_a_narrow_terminal_keeps_its_words(on_terminal, monkeypatch):
    screen = on_terminal()
    monkeypatch.setenv("COLUMNS", "90")
    with in_parts():
        begin_part("1 of 2: the teacher")
        training = TrainingProgress(total=2000, start=0)
        training.step(100)
        training.values({"loss": 0.2512, "images_per_s": 12345.0, "steps_per_s": 1.0})
        training.close()
    assert "loss 0.2512  12345 images/s 0:31:40 left" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())


def test_training_does_not_flood(capsys):
    training = TrainingProgress(total=1000, start=0, every_s=3600.0)
    for step in range(1, 1001):
        training.step(step)
        training.values({"loss": 0.5, "images_per_s": 1.0, "steps_per_s": 1.0})
    assert len(capsys.readouterr().err.splitlines()) == 2, "the first and the last"


def test_training_shows_a_bar_on_a_terminal_and_lines_above_it(on_terminal):
    screen = on_terminal()
    training = TrainingProgress(total=10, start=4)
    say("a note")
    training.step(10)
    training.values({"loss": 0.25, "images_per_s": 100.0, "steps_per_s": 2.0})
    training.close()
    text = screen.getvalue()
    assert text.index("4/10") < text.index("a note") < text.index("10/10")
    assert "loss 0.25" in text


def test_progress_of_a_short_job_says_nothing(on_terminal):
    screen = on_terminal()
    with progress(100, "sorting") as bar:
        for _ in range(100):
            bar.advance()
    assert screen.getvalue() == ""


def test_progress_shows_a_bar_once_it_takes_long_and_takes_it_away_again(on_terminal, monkeypatch):
    monkeypatch.setattr(progress_bar, "_BAR_AFTER_S", 0.0)
    screen = on_terminal()
    with progress(100, "sorting") as bar:
        bar.advance(30)
        bar.advance(40)
    text = screen.getvalue()
    assert "sorting" in text
    assert "70/100" in text
    assert text.endswith("\x1b[2K"), "the last thing is to clear its line"


def test_progress_prints_a_line_from_time_to_time_elsewhere(capsys, lines_at_once):
    with progress(100, "sorting") as bar:
        time.sleep(0.05)
        bar.update(50)
    with progress(None, "listing") as bar:
        bar.advance(7)
    assert capsys.readouterr().err == "sorting 50/100  0:00:00 left\nlisting 7\n"


def test_progress_tells_the_time_left(capsys, lines_at_once, monkeypatch):
    monkeypatch.setattr(progress_bar.time, "monotonic", iter([0.0, 30.0, 30.0]).__next__)
    with progress(100, "sorting") as bar:
        bar.update(1)
    assert capsys.readouterr().err == "sorting 1/100  0:49:30 left\n"


def test_progress_is_rank_0s_alone(capsys, lines_at_once, monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with progress(10, "sorting") as bar:
        bar.advance(5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["dumb", ""])
def test_progress_on_a_terminal_without_a_cursor_prints_lines(kind, on_terminal, lines_at_once, monkeypatch):
    monkeypatch.setattr(progress_bar, "_BAR_AFTER_S", 0.0)
    screen = on_terminal(kind)
    with progress(10, "sorting") as bar:
        bar.advance(5)
    assert screen.getvalue().startswith("sorting 5/10")


def test_a_full_disk_behind_stderr_ends_nothing(monkeypatch, lines_at_once):
    class Full(Screen):
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setenv("TERM", "xterm")
    say("lost")
    training = TrainingProgress(10, 0)
    training.step(10)
    training.values({"loss": 0.5, "images_per_s": 1.0, "steps_per_s": 1.0})
    training.close()


def test_data_preparation_shows_how_far_it_is(tmp_path, capsys, lines_at_once):
    for i in range(40):
        pixels = np.full((8, 8, 3), i, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    values = {"name": "image_folder", "root": str(tmp_path), "image_size": 8}
    registry.make("dataset", values).load()
    shown = capsys.readouterr().err
    assert "listing images 40" in shown
    assert "decoding images 40/40" in shown
    lazy = registry.make("dataset", values | {"memory_gb": 0.0})
    lazy.sigma_data()
    assert "measuring contrast, images 40/40" in capsys.readouterr().err


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]


# ------------------------------------------------------------------------------------------------------ --quiet


def test_quiet_leaves_what_went_wrong(capsys, quiet, lines_at_once):
    say("news")
    complain("trouble")
    with progress(10, "sorting") as bar:
        bar.advance(5)
    training = TrainingProgress(10, 0)
    training.step(10)
    training.values({"loss": 0.5, "images_per_s": 1.0, "steps_per_s": 1.0})
    training.close()
    assert capsys.readouterr().err == "trouble\n"


@pytest.mark.long
def test_quiet_commands_print_nothing_but_errors(command, tmp_path):
    """Alone, in two ranks and in a sweep; then sampling, then wrong input."""
    edm, two, sweep = ["mode=edm", *TINY], ["mode=ict", *TINY, "devices=2"], ["-m", "mode=ict", *TINY, "seed=1,2"]
    for arguments in (edm, two, sweep):
        done = command("train", *arguments, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), arguments
    done = command("sample", "ckpt=runs/digits-edm", "num=2", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "samples" / "digits-edm-step-6-40-steps" / "grid.png").exists()
    for name, wrong in (("train", "mode=edn"), ("sample", "ckpt=nowhere")):
        done = command(name, wrong, "--quiet")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    done = command("train", "mode=edm", *TINY, "seed=5", "devices=2", "--quiet")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    done = command("train", "--quiet", "--help")
    assert "Exit codes" in done.stdout, "what is asked for is answered"


@pytest.mark.long
@pytest.mark.command
@pytest.mark.skipif(torch.cuda.is_available(), reason="one GPU may not have two ranks")
def test_quiet_under_torchrun(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "cm_train.commands.train", "mode=ict", *TINY, "--quiet"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_quiet_ranks_say_what_went_wrong_once(command, tmp_path):
    """In ranks of their own the last line is theirs: a data set that only they read."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"nothing")
    options = ["dataset=image_folder", "dataset.root=photos", "dataset.image_size=8", "backbone=unet_xs"]
    done = command("train", "mode=ict", *options, *TINY, "devices=2", "--quiet")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "broken.png" in done.stderr


# ------------------------------------------------------------------------------------------- sampling, header, summary


def test_sampling_prints_plain_lines_where_there_is_no_terminal(command, warm, tmp_path):
    assert command("train", "mode=edm", *TINY).returncode == 0
    every_time = "import cm_train.core.progress as p; p.EVERY_S = 0; from cm_train.commands.sample import main; main()"
    done = warm.run(["-c", every_time, "ckpt=runs/digits-edm", "num=5", "batch_size=2", "steps=2"], cwd=tmp_path)
    first, *middle, where, images, beside = done.stderr.splitlines()
    assert first.startswith("5 images from runs/digits-edm/checkpoints/step_00000006, ema weights, 3 network calls")
    assert [line.split("  ")[0] for line in middle] == ["sampling 2/5", "sampling 4/5", "sampling 5/5"]
    assert all(line.endswith(" left") for line in middle)
    assert where == "wrote to samples/digits-edm-step-6-2-steps:"
    assert images == "  images/00000000.png to images/00000004.png (5 images)"
    assert beside == "  grid.png, request.json"


def test_train_tells_what_runs_where_and_what_came_of_it(command):
    done = command("train", "mode=ict", *TINY, "max_hours=1.5", "devices=2", "preview_every=6")
    lines = done.stderr.splitlines()
    assert lines[0] == "ict on digits: 6 steps of 16 images, for 1.5 hours at most"
    assert lines[1] == "run folder runs/digits-ict; tracking: runs/digits-ict/metrics.jsonl only"
    assert lines[2] == "digits: 1,797 images, no classes"
    assert lines[3] == "on 2 processes, CPU, float32; not compiled, which does not pay on a CPU"
    scale = (
        r"network unet, 390,433 parameters; 0.1 epochs; about 0.01 GiB for 8 images at once, and [\d.]+ GiB are free"
    )
    assert re.fullmatch(scale, lines[4])
    assert lines[5].startswith("step 2/6  loss ")
    assert lines[5].endswith(" left")
    assert lines[-3].startswith("6 steps in 0:0")
    assert " images/s, loss " in lines[-3]
    assert lines[-2] == "checkpoint runs/digits-ict/checkpoints/step_00000006"
    assert lines[-1] == "done; samples in runs/digits-ict/samples. Next: cm-sample ckpt=runs/digits-ict"


@pytest.fixture
def config(composed, tmp_path):
    return parse(composed("mode=cd", "teacher=runs/t", f"run_dir={tmp_path}", "tracking=wandb", *TINY[1:]))


def test_header_tells_where_pictures_go(config, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def shown(**changes):
        tracking = {key: changes.pop(key) for key in ("previews", "backend") if key in changes}
        tracking = config.tracking.model_copy(update=tracking)
        announce.header(config.model_copy(update={"preview_every": 5, **changes, "tracking": tracking}))
        return capsys.readouterr().err.split("tracking: ")[1].strip()

    stay = "previews stay here, tracking.previews=true sends them"
    assert shown() == "wandb project cm_train (offline without a login, with previews)"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret")
    assert shown() == "wandb project cm_train (online, with previews)"
    assert shown(previews=False) == f"wandb project cm_train (online; {stay})"
    assert shown(previews=False, preview_every=0) == "wandb project cm_train (online)", "there are none"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.our-lab.org")
    assert shown(previews=True) == "wandb project cm_train (offline without a login, with previews)"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert shown(previews=True) == "wandb project cm_train (online, with previews)"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert shown(previews=False) == f"wandb project cm_train (WANDB_MODE=offline; {stay})"
    assert shown(previews=False, backend="tensorboard").endswith(f"/tensorboard ({stay})")
    assert shown(backend="tensorboard").endswith("/tensorboard")


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine that seems to have four, none of which can be touched."""

    def touched(*_):
        raise AssertionError("opens a CUDA context")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_command_that_starts_ranks_opens_no_cuda_context_of_its_own(config, four_gpus, capsys):
    """It would take half a gigabyte for nothing, and a GPU in exclusive mode away from its rank."""
    announce.header(config)
    announce.header(config.model_copy(update={"precision": "bf16"}))
    assert launching.num_ranks("auto") == 4
    assert gpus.visible() == ["0", "1", "2", "3"]
    shown = capsys.readouterr().err
    assert "cd on digits from teacher runs/t: 6 steps of 16 images\n" in shown
    assert "tracking: wandb project cm_train" in shown


def test_ranks_name_their_machine_precision_and_compilation(config, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    announce.machine(config, World(size=4), "compiled")
    announce.machine(config.model_copy(update={"precision": "tf32", "deterministic": True}), World(), "not compiled")
    assert capsys.readouterr().err.splitlines() == [
        "on 4 processes, NVIDIA H100, bfloat16; compiled",
        "on 1 process, NVIDIA H100, TF32, deterministic; not compiled",
    ]


def test_summary_of_each_ending(config, tmp_path, capsys):
    lines = ['{"step": 2, "loss": 9.0, "agreement_rms": 0.125}', '{"step": 4, "loss": 0.5, "images_per_s": 70.4}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"torn')
    four, six = SimpleNamespace(step=4), SimpleNamespace(step=6)
    began = time.monotonic() - 3723
    announce.summary(config, began, False, None, four)
    home = os.fspath(tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        "4 steps in 1:02:03, 70 images/s, loss 0.5, agreement_rms 0.125",
        f"checkpoint {home}/checkpoints/step_00000004",
        "stopped at step 4 of 6, everything saved; the same command goes on",
    ]
    announce.summary(config, began, True, four, six)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("2 steps in")
    assert shown[-1] == f"done. Next: cm-sample ckpt={home}"
    announce.summary(config, began, False, None, None)
    assert "stopped before the first step" in capsys.readouterr().err
