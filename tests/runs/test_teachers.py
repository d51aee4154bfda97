"""A student that has begun knows its teacher: what becomes of it where that one is gone, has moved, or is another."""

import shutil

import pytest

from conftest import TINY

MORE = [*TINY, "steps=9", "schedule_steps=6"]


@pytest.fixture
def widowed(command, tmp_path):
    """A folder with a finished student of each kind, by loss (cd) and by first weights only (sct); "moved" has the
    teacher."""
    for mode in ("edm", "cd", "sct"):
        assert command("train", f"mode={mode}", *TINY).returncode == 0
    (tmp_path / "runs" / "digits-edm").rename(tmp_path / "moved")
    return tmp_path


@pytest.mark.long
def test_student_whose_teacher_is_gone(command, widowed):
    runs, metrics = widowed / "runs", widowed / "runs" / "digits-cd" / "metrics.jsonl"
    before = metrics.read_bytes()

    # Finished is finished, alone and in a sweep.
    done = command("train", "-m", "mode=cd,sct", *TINY)
    assert done.returncode == 0 and done.stderr.count("is finished at step 6") == 2, done.stderr

    # One that needs the teacher to go on says so at once, and names what would help.
    for more in ([], ["teacher=runs/nowhere"]):
        done = command("train", "mode=cd", *MORE, *more)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "the teacher that runs/digits-cd began with is not in runs/" in done.stderr
        assert "teacher=..." in done.stderr
    assert sorted(path.name for path in runs.iterdir()) == ["digits-cd", "digits-sct", "sweeps"], (
        "no teacher is trained"
    )
    assert metrics.read_bytes() == before

    # Where it has moved to it is known again, and from then on without a word.
    done = command("train", "mode=cd", *MORE, "teacher=moved")
    assert done.returncode == 0 and "resuming at step 6" in done.stderr, done.stderr
    done = command("train", "mode=cd", *MORE, "steps=10")
    assert done.returncode == 0 and "resuming at step 9" in done.stderr, done.stderr


@pytest.mark.long
def test_damaged_teacher_is_called_so(command, tmp_path):
    for mode in ("edm", "cd"):
        assert command("train", f"mode={mode}", *TINY).returncode == 0
    for file in (tmp_path / "runs" / "digits-edm").glob("checkpoints/*/ema_*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    done = command("train", "mode=cd", *MORE)
    assert done.returncode == 2 and "is damaged" in done.stderr and "has 100 bytes" in done.stderr, done.stderr


@pytest.mark.long
def test_student_that_had_its_first_weights_of_a_teacher_goes_on_without_it(command, widowed):
    shutil.copytree(widowed / "runs" / "digits-sct", widowed / "copy")
    done = command("train", "mode=sct", *MORE)
    assert done.returncode == 0 and "no longer measured" in done.stderr, done.stderr
    done = command("train", "mode=sct", *MORE, "run_dir=copy", "teacher=moved")
    assert done.returncode == 0 and "no longer measured" not in done.stderr, done.stderr
    alone, together = (
        home / "checkpoints" / "step_00000009" / "denoiser.safetensors"
        for home in (widowed / "runs" / "digits-sct", widowed / "copy")
    )
    assert alone.read_bytes() == together.read_bytes()
    # It still knows whose it was, and refuses another.
    assert command("train", "mode=edm", *TINY, "seed=1", "name=other").returncode == 0
    done = command("train", "mode=sct", *MORE, "steps=10", "teacher=runs/other")
    assert done.returncode == 2 and "the teacher that runs/digits-sct began with is not in runs/other" in done.stderr
