"""What a run says is kept in its folder, whatever stderr is."""

import os
import re
import warnings

import pytest

from cm_train.core.errors import InputError
from cm_train.core.run_log import logged
from cm_train.core.terminal import complain, say, silence
from conftest import ENVIRONMENT, TINY


def lines(path):
    found = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (.*)", line) for line in path.read_text().splitlines()]
    assert all(found)
    return [line[1] for line in found]


def test_what_is_said_is_logged_for_the_innermost_run(tmp_path, capsys):
    say("before")
    with logged(tmp_path / "student"):
        say("a")
        with logged(tmp_path / "teacher"):
            complain("b\x1b[2J")
        say("c")
    say("after")
    assert lines(tmp_path / "student") == ["a", "c"]
    assert lines(tmp_path / "teacher") == ["b\\x1b[2J"]
    assert len(capsys.readouterr().err.splitlines()) == 5, "and shown"


def test_a_quiet_run_is_logged_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CM_TRAIN_QUIET", "0")
    monkeypatch.setenv("PYTHONWARNINGS", "")
    with warnings.catch_warnings(), logged(tmp_path / "log"):
        silence()
        say("a")
    assert lines(tmp_path / "log") == ["a"] and capsys.readouterr().err == ""


@pytest.mark.filterwarnings("always")
def test_warnings_and_what_ends_a_run_are_logged(tmp_path):
    with pytest.raises(InputError), logged(tmp_path / "refused"):
        raise InputError("no such data", "x")
    assert lines(tmp_path / "refused") == ["ended: no such data; got 'x'"]
    with pytest.raises(ZeroDivisionError), logged(tmp_path / "broken"):
        warned_and_broken()
    warning, first, *_, last = lines(tmp_path / "broken")
    assert warning == "warning: odd"
    assert first.startswith("Traceback") and last == "ZeroDivisionError: division by zero"


def warned_and_broken():
    warnings.warn("odd", stacklevel=1)
    1 / 0  # noqa: B018


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "nowhere"])
def test_a_log_that_can_not_be_written_ends_nothing(kind, tmp_path):
    path, elsewhere = tmp_path / "log", tmp_path / "precious"
    elsewhere.write_text("text")
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = tmp_path / "no" / "log"
    with logged(path):
        say("a")
    assert elsewhere.read_text() == "text"


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_is_logged_whoever_trains_it(devices, command, tmp_path):
    for steps in (4, 6, 6):
        done = command("train", "mode=ict", *TINY, f"steps={steps}", f"devices={devices}", "--quiet")
        assert (done.returncode, done.stderr) == (0, "")
    found = lines(tmp_path / "runs" / "digits-ict" / "run.log")
    assert [line for line in found if line.startswith("ict on digits: ")] == [
        "ict on digits: 4 steps of 16 images",
        "ict on digits: 6 steps of 16 images",
    ]
    assert found.count("resuming at step 4") == 1
    assert found.count("digits: 1,797 images, no classes") == 2
    assert found[-1].startswith("runs/digits-ict is finished at step 6")


def test_a_rank_that_fails_is_logged_once(warm, tmp_path):
    """Its traceback by itself, and why the run has ended by the command; nothing by the others."""
    broken = (
        "import cm_train.training.steps as s\n"
        "real = s.Steps.train_step\n"
        "def step(self, data):\n"
        "    if self.world.rank == 1 and self.step == 3: raise RuntimeError('a bug in one rank')\n"
        "    real(self, data)\n"
        "s.Steps.train_step = step\n"
    )
    (tmp_path / "broken_worker.py").write_text(f"{broken}from cm_train.runs import worker\nworker.main()\n")
    launch = (
        "import cm_train.runs.launch as l\nreal = l.launch\n"
        "l.launch = lambda num, module, *rest: real(num, 'broken_worker', *rest)\n"
        "from cm_train.commands.train import main; main()"
    )
    env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = warm.run(["-c", launch, "mode=ict", *TINY, "devices=2"], cwd=tmp_path, env=env)
    assert done.returncode == 1 and "a bug in one rank" in done.stderr, done.stderr
    found = lines(tmp_path / "runs" / "digits-ict" / "run.log")
    assert [line for line in found if line.startswith("Traceback")] == ["Traceback (most recent call last):"]
    assert found.count("RuntimeError: a bug in one rank") == 1
    assert len([line for line in found if line.startswith("ended: ")]) == 1
