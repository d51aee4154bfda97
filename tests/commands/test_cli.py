"""The commands as a user types them, each in a process of its own."""

import fcntl
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from cm_train.core import configs
from conftest import ENVIRONMENT, TINY, timeless, wait_for

EDM = ["mode=edm", *TINY]


def test_train_then_sample(command, tmp_path):
    done = command("train", "mode=ict", *TINY)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits-ict"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 4, 6]
    assert "cm-sample ckpt=runs/digits-ict" in done.stderr

    done = command("sample", "ckpt=runs/digits-ict", "num=5", "seed=10", "out=pictures")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["grid.png", "images", "request.json"]
    images = tmp_path / "pictures" / "images"
    assert sorted(p.name for p in images.iterdir()) == [f"{i:08d}.png" for i in range(10, 15)]
    assert Image.open(images / "00000010.png").size == (8, 8)

    done = command("sample", "ckpt=runs/digits-ict", "num=5", "seed=10", "out=packed", "format=npz", "batch_size=2")
    assert done.returncode == 0, done.stderr
    arrays = np.load(tmp_path / "packed" / "samples.npz")
    images = arrays[arrays.files[0]]
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8
    png = np.asarray(Image.open(tmp_path / "pictures" / "images" / "00000012.png"))
    assert np.abs(png.astype(int) - images[2, :, :, 0]).max() <= 1, "image i depends on seed + i alone"

    again = command("train", "mode=ict", *TINY)
    assert again.returncode == 0
    assert "is finished at step 6" in again.stderr


@pytest.mark.long
def test_cd_trains_its_missing_teacher_first_and_says_so(command, start, tmp_path):
    """Stopped inside the teacher's training: exit code 3, and the same command goes on with the teacher."""
    arguments = ["mode=cd", *TINY, "seed=3"]
    process = start("train", *arguments)
    config = tmp_path / "runs" / "digits-edm" / "metrics.jsonl"
    wait_for(lambda: config.exists() and config.stat().st_size > 0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "no finished teacher in runs/digits-edm: training it first" in err
    teacher = (tmp_path / "runs" / "digits-edm" / "config.yaml").read_text()
    assert "mode: edm" in teacher
    assert "seed: 3" in teacher
    assert "backend: none" in teacher
    assert "steps: 2000" in teacher, "the teacher has its own recipe"


@pytest.mark.long
def test_cd_finishes_a_teacher_that_was_begun_by_its_own_settings_then_trains_the_student(command, start, tmp_path):
    # Its tracking is the command's to say: a stored wandb must not put pictures online that tracking=none keeps here.
    process = start("train", "mode=edm", "tracking=wandb", "steps=60", "batch_size=24", "log_every=1", "save_every=1")
    checkpoints = tmp_path / "runs" / "digits-edm" / "checkpoints"
    wait_for(lambda: any(checkpoints.glob("step_*")))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 3
    done = command("train", "mode=cd", *TINY)
    assert done.returncode == 0, done.stderr
    assert "edm on digits: 60 steps of 24 images" in done.stderr
    assert "backend: none" in (tmp_path / "runs" / "digits-edm" / "config.yaml").read_text()
    assert "wandb" not in done.stderr
    assert "resuming at step" in done.stderr
    assert "cd on digits from teacher runs/digits-edm: 6 steps" in done.stderr
    assert (tmp_path / "runs" / "digits-cd" / "checkpoints" / "step_00000006").exists()
    again = command("train", "mode=cd", *TINY)
    assert "is finished at step 6" in again.stderr

    # A teacher of other data, or of another size than was asked for, is not taken in silence.
    done = command("train", "mode=cd", *TINY, "dataset.split=train", "name=other")
    assert done.returncode == 2
    assert "was trained on other data" in done.stderr
    done = command("train", "mode=cd", *TINY, "backbone=unet_s", "name=wide")
    assert done.returncode == 2
    assert "a student has the backbone that it starts from" in done.stderr


def test_run_of_a_version_that_knew_fewer_keys_goes_on(command, tmp_path):
    edm = ["mode=edm", *TINY, "ema.half_life_images=500000"]  # which is stored as the decay that it was then
    assert command("train", *edm, "steps=3", "schedule_steps=6").returncode == 0
    stored = tmp_path / "runs" / "digits-edm" / "config.yaml"
    assert "  decay: 0.9999778\n" in stored.read_text()
    for key in ("embedding_norm: false", "dropout_max_size: null", "clip_norm: null", "power: []"):
        assert f"  {key}\n" in stored.read_text()
        stored.write_text(stored.read_text().replace(f"  {key}\n", ""))
    stored.write_text(stored.read_text().replace("  half_life_images: null\n", ""))
    done = command("train", *edm, "backbone.embedding_norm=true", "backbone.scale_shift=true")
    assert done.returncode == 2 and "backbone.embedding_norm (False -> True)" in done.stderr
    done = command("train", *edm, "ema.half_life_images=1e6")
    assert done.returncode == 2 and "ema.decay (0.9999778 -> 0.9999889)" in done.stderr
    done = command("train", *edm)
    assert done.returncode == 0 and "resuming at step 3" in done.stderr, done.stderr


def test_all_checkpoints_damaged_never_starts_over(command, tmp_path):
    assert command("train", *EDM).returncode == 0
    for state in (tmp_path / "runs" / "digits-edm" / "checkpoints").glob("*/state.pt"):
        state.write_bytes(b"")
    for _ in range(2):
        done = command("train", *EDM, "steps=8")
        assert done.returncode == 2, done.stderr
        assert "is damaged" in done.stderr
    assert len((tmp_path / "runs" / "digits-edm" / "metrics.jsonl").read_text().splitlines()) == 3


def test_killed_and_resumed_equals_uninterrupted(command, start, tmp_path):
    """kill -9 in the middle, the same command again: the same bytes of weights and of metrics."""
    arguments = ["mode=ct", *TINY, "steps=40", "save_every=7", "objective.target_decay=0.9", "backbone.dropout=0.2"]
    assert command("train", *arguments, "name=whole").returncode == 0
    process = start("train", *arguments, "name=parts")
    checkpoints = tmp_path / "runs" / "parts" / "checkpoints"
    wait_for((checkpoints / "step_00000014").exists)
    process.kill()
    process.wait()
    assert not (checkpoints / "step_00000040").exists(), "killed too late to show anything"
    resumed = command("train", *arguments, "name=parts")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr

    whole = tmp_path / "runs" / "whole" / "checkpoints" / "step_00000040"
    for file in whole.iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (checkpoints / "step_00000040" / file.name).read_bytes(), file.name

    def rows(name):
        text = (tmp_path / "runs" / name / "metrics.jsonl").read_text()
        return timeless([json.loads(line) for line in text.splitlines()])

    assert rows("parts") == rows("whole")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGINT, signal.SIGUSR1))]
)
def test_signal_saves_and_exits_3_and_the_same_command_goes_on(number, command, start, tmp_path):
    arguments = ["mode=ict", *TINY, "steps=100000", "save_every=100000", "log_every=1"]
    process = start("train", *arguments)
    metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert err.count("stopping as soon as everything is saved") == 1
    assert ("Ctrl-C again quits without" in err) == (number == signal.SIGINT)
    (saved,) = (tmp_path / "runs" / "digits-ict" / "checkpoints").iterdir()
    step = json.loads((saved / "manifest.json").read_text())["step"]
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == step
    resumed = command("train", *arguments[:-3], f"steps={step + 1}", "save_every=100000", "log_every=1")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming at step {step}" in resumed.stderr


WRONG = [
    (["mode=cx"], "no such option mode=cx; allowed: cd, ct, ect, edm, ict"),
    (["ema.decya=0.9"], "unknown key ema.decya; did you mean ema.decay?"),
    (["steps=many"], "steps: input should be a valid integer; got 'many'"),
    (["teacher=nowhere"], "no checkpoint there; got 'nowhere'"),
    (["mode=ict", "init=nowhere"], "no checkpoint there; got 'nowhere'"),
    (["mode=edm", "init=teacher"], "runs/digits-edm can't be its own teacher"),
    (["mode=ict", "teacher=runs/x"], "mode ict takes no teacher"),
    (["mode=cd", "init=nowhere"], "no checkpoint there; got 'nowhere'"),
    (["mode=cd", "noise=lognormal"], "this mode draws levels of a grid"),
    (["mode=edm", "noise=uniform"], "this mode draws continuous noise levels"),
    (["dataset=image_folder", "mode=ict"], "dataset.root is missing; fix: set dataset.root=..."),
    (["dataset=image_folder", "mode=ict", "dataset.root=nowhere"], "nowhere"),
    (["dataset=mnist", "mode=ict", "dataset.download=false"], "MNIST is not in data/MNIST/raw"),
    (["mode=ict", "backbone.channel_mult=[1,1,1,1,1]"], "channel_mult"),
    (["mode=ict", "run_dir=/proc/nowhere"], "can't write the run folder"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, command):
    done = command("train", "tracking=none", *arguments)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert message in lines[-1]
    assert "Traceback" not in done.stderr
    assert len([line for line in lines if line.startswith("train.py:")]) == 1


def test_full_error_shows_the_traceback(command):
    done = command("train", "mode=ict", "steps=0", HYDRA_FULL_ERROR="1")
    assert "Traceback" in done.stderr


def test_a_config_of_another_run_is_refused_and_what_may_change_is_not(command):
    assert command("train", *EDM).returncode == 0
    done = command("train", *EDM, "schedule_steps=50")
    assert done.returncode == 2
    assert "schedule_steps (6 -> 50)" in done.stderr
    done = command("train", *EDM, "optimizer.lr=0.5", "seed=9")
    assert done.returncode == 2
    assert "seed (0 -> 9)" in done.stderr
    assert "optimizer.lr (0.001 -> 0.5)" in done.stderr
    done = command("train", *EDM, "steps=8", "micro_batch=4", "log_every=1")
    assert done.returncode == 0, done.stderr
    assert "edm on digits: 8 steps" in done.stderr
    assert "resuming at step 6" in done.stderr
    assert "the learning rate is 0 from step 6 on" in done.stderr


def test_a_folder_that_a_run_holds_is_refused_with_its_name(command, tmp_path):
    folder = tmp_path / "runs" / "digits-edm"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "a+") as held:
        held.write("process 4711 (cm-train mode=edm)")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        done = command("train", *EDM)
    assert done.returncode == 2
    assert "is in use by process 4711 (cm-train mode=edm)" in done.stderr


def test_a_truncated_checkpoint_is_named_and_nothing_is_lost(command, tmp_path):
    assert command("train", *EDM).returncode == 0
    checkpoints = tmp_path / "runs" / "digits-edm" / "checkpoints"
    newest = checkpoints / "step_00000006"
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:100])
    done = command("sample", f"ckpt={newest}", "num=1")
    assert done.returncode == 2
    assert "state.pt has 100 bytes instead of" in done.stderr
    done = command("sample", "ckpt=runs/digits-edm", "num=1", "steps=2")
    assert done.returncode == 0, done.stderr
    assert "using step_00000003" in done.stderr
    done = command("train", *EDM)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 3" in done.stderr
    assert (checkpoints / "damaged_step_00000006").exists()


@pytest.mark.long
def test_a_run_that_never_saved_can_be_started_over_with_another_config(command):
    """A mistake in the first command must not block the folder."""
    assert command("train", "mode=ict", *TINY, "dataset=mnist", "name=x", "dataset.download=false").returncode == 2
    assert command("train", "mode=ict", *TINY, "name=x").returncode == 0


SAMPLE_WRONG = [
    ([], "no checkpoint given"),
    (["ckpt=nowhere"], "no checkpoint there; got 'nowhere'"),
    (["ckpt=runs/digits-edm", "weights=best"], "no such weights"),
    (
        ["ckpt=runs/digits-edm", "sampler=ddim"],
        "unknown sampler; got 'ddim'; allowed: auto, euler, heun, multistep, onestep",
    ),
    (["ckpt=runs/digits-edm", "sigmas=[1,80]"], "sigmas must descend"),
    (["ckpt=runs/digits-edm", "labels=3"], "this checkpoint has no classes"),
    (["ckpt=runs/digits-edm", "steps=0"], "steps: "),
    (["ckpt=runs/digits-edm", "num=0"], "num: "),
    (["ckpt=runs/digits-edm", "device=tpu9"], "no such device here; got 'tpu9'"),
    (["ckpt=runs/digits-edm", "out=/proc/nowhere"], "can't write"),
]


def test_wrong_sample_input_is_one_line_and_exit_code_2(command):
    assert command("train", *EDM).returncode == 0
    for arguments, message in SAMPLE_WRONG:
        done = command("sample", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr, arguments
        assert "Traceback" not in done.stderr


def test_help_fits_a_screen(command):
    for name in ("train", "sample"):
        done = command(name, "--help")
        assert done.returncode == 0
        assert sum(1 + len(line) // 100 for line in done.stdout.splitlines()) <= 45, "lines on a screen of 100 columns"
        assert "Exit codes" in done.stdout


def test_info_says_where_things_are(command, tmp_path):
    done = command("train", "--info")
    assert done.returncode == 0, done.stderr
    for text in (str(tmp_path / "runs"), str(configs.conf_dir()), torch.__version__, "vgg16", "WANDB_MODE=disabled"):
        assert text in done.stdout
    assert "Config search path" in done.stdout, "what Hydra knows follows"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_can_be_installed(shell, command):
    done = command("train", "-sc", f"install={shell}")
    assert done.returncode == 0 and "complet" in done.stdout


def test_shell_completion_knows_groups_and_keys(command, monkeypatch):
    for typed, expected in (("mode=s", {"mode=scd", "mode=sct"}), ("ema.dec", {"ema.decay="})):
        monkeypatch.setitem(ENVIRONMENT, "COMP_LINE", f"cm-train {typed}")
        assert set(command("train", "-sc", "query=bash").stdout.split()) >= expected


def test_image_folder_trains(command, tmp_path):
    folder = tmp_path / "photos" / "cats"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, mode in enumerate(["RGB", "L", "RGBA", "P"] * 3):
        Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).convert(mode).save(folder / f"{i}.png")
    done = command(
        "train",
        "mode=ict",
        "dataset=image_folder",
        "dataset.root=photos",
        "dataset.image_size=16",
        "backbone=unet_xs",
        *TINY,
    )
    assert done.returncode == 0, done.stderr
    done = command("sample", "ckpt=runs/photos-ict", "num=2", "out=pictures")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "pictures" / "images" / "00000000.png").mode == "RGB"


def test_a_run_leaves_nothing_beside_its_folder(command, tmp_path):
    assert command("train", "mode=ict", *TINY, "steps=1").returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
