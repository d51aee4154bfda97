"""cm-sample killed at random moments, again and again: in the end the files of a command that was left alone."""

import contextlib
import hashlib
import itertools
import os
import random
import signal
import time

import pytest
import torch
from test_checkpoints import write

from cm_train.commands.sample_folder import PARTS, UNPACKED
from conftest import children, wait_for

FEW, MANY = (300, 2), (5000, 10)  # images and kills
CASES = [(*FEW, "png", 1), (*FEW, "npz", 2)]
CASES += [
    pytest.param(*sizes, format, devices, marks=pytest.mark.long)
    for sizes, format, devices in itertools.product((FEW, MANY), ("png", "npz"), (1, 2))
    if (*sizes, format, devices) not in CASES
]


def hashes(folder):
    """The sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def num_drawn(out):
    """How many images there are by now, of any format."""
    try:
        names = [*os.listdir(out / "images")] if (out / "images").is_dir() else []
        names += os.listdir(out / PARTS) if (out / PARTS).is_dir() else []
        rows = (out / UNPACKED).stat().st_size // 64 if (out / UNPACKED).exists() else 0
    except FileNotFoundError:  # it was packed in this moment
        return 0
    return len(names) + rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="one GPU has one process")
@pytest.mark.parametrize(("num", "kills", "format", "devices"), CASES)
def test_a_job_that_is_killed_again_and_again_has_the_files_of_one_that_was_not(
    num, kills, format, devices, command, start, tmp_path
):
    write(tmp_path / "run", 5)
    words = ["run", f"num={num}", "batch_size=7", "steps=30", f"format={format}", f"devices={devices}"]
    out, dice, killed = tmp_path / "x", random.Random(f"{num} {format} {devices}"), 0
    for i in range(kills):
        process = start("sample", *words, "out=x")
        if dice.random() < 0.8:  # else while it starts, looks at what is there, or has just begun
            enough = int((i + dice.random()) / (kills + 1) * num)
            wait_for(lambda enough=enough, process=process: num_drawn(out) > enough or process.poll() is not None)
        else:
            time.sleep(dice.uniform(0, 3))
        ranks = children(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice([process.pid, *ranks]), signal.SIGKILL)
            killed += 1
        process.communicate(timeout=60)
        wait_for(lambda ranks=ranks: not any(os.path.exists(f"/proc/{rank}") for rank in ranks))
    assert killed >= kills - 1, "too late to show anything"
    for folder in ("x", "y"):
        done = command("sample", *words, f"out={folder}")
        assert done.returncode == 0, done.stderr
    assert hashes(out) == hashes(tmp_path / "y")
    assert len(hashes(out)) == (num + 2 if format == "png" else 3)
