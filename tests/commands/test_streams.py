"""Odd locales and odd streams: a command works, or says one line; its exit code is its own."""

import json
import os
import subprocess
import sys

import pytest

from cm_train.runs import rank
from conftest import ENVIRONMENT, TINY

EDM = ["mode=edm", *TINY]
# Of a machine without any setting, and of one that knows ASCII alone and is not let to take UTF-8 instead.
BARE = {k: v for k, v in ENVIRONMENT.items() if k != "LANG" and not k.startswith(("LC_", "PYTHONIO", "PYTHONUTF8"))}
ASCII = {**BARE, "LC_ALL": "C", "PYTHONUTF8": "0"}


@pytest.fixture
def shell(tmp_path):
    """shell(environment, "devices=2", redirect="2>/dev/full") -> the finished process of cm-train."""

    def run(environment, *arguments, redirect="", cwd=tmp_path):
        script = f'exec "{sys.executable}" -m cm_train.commands.train "$@" {redirect}'
        cwd.mkdir(exist_ok=True)
        return subprocess.run(
            ["bash", "-c", script, "cm-train", *arguments], cwd=cwd, env=environment, capture_output=True, timeout=120
        )

    return run


def steps_of(run):
    assert (run / "checkpoints" / "step_00000006" / "manifest.json").exists()
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def taking_nothing(request, warm, shell, tmp_path):
    """A command whose stdout and stderr are closed or on a full disk: its exit code, by its arguments."""
    start, streams = request.param
    redirect = ">&- 2>&-" if streams == "closed" else ">/dev/full 2>/dev/full"
    if start == "cold":
        yield lambda *arguments: shell(BARE, *arguments, redirect=redirect).returncode
        return
    with open("/dev/full" if streams == "full" else os.devnull, "w") as full:
        where = {"closed": (1, 2)} if streams == "closed" else {"stdout": full, "stderr": full}
        argv = ["-m", "cm_train.commands.train"]
        yield lambda *arguments: warm.run([*argv, *arguments], cwd=tmp_path, **where).returncode


COLD = [pytest.param(("cold", streams), marks=pytest.mark.long) for streams in ("closed", "full")]


@pytest.mark.parametrize("taking_nothing", [("warm", "closed"), ("warm", "full"), *COLD], indirect=True, ids=str)
def test_streams_that_take_nothing_change_neither_run_nor_exit_code(taking_nothing, tmp_path):
    """In ranks and in a sweep; Python by itself ends with 120 where a stream can't be flushed."""
    assert taking_nothing(*EDM, "devices=2") == 0
    assert steps_of(tmp_path / "runs" / "digits-edm") == [2, 4, 6]
    assert taking_nothing("-m", *EDM, "name=b") == 0
    assert steps_of(tmp_path / "runs" / "b") == [2, 4, 6]
    assert taking_nothing("mode=edn") == 2
    (tmp_path / "photos").mkdir()
    photos = ["mode=edm", *TINY, "dataset=image_folder", "dataset.root=photos", "dataset.image_size=8", "devices=2"]
    assert taking_nothing(*photos) == 2, "found out by the ranks"


@pytest.mark.long
@pytest.mark.command
def test_letters_that_a_stream_lacks_are_written_out(shell, tmp_path):
    """A locale that is not installed, a terminal without a cursor, and streams that take ASCII alone."""
    odd = {**BARE, "LC_ALL": "de_DE", "TERM": "dumb", "PYTHONIOENCODING": "ascii"}
    done = shell(odd, "-m", *EDM, "seed=0,1", "name='José'")
    shown = done.stderr.decode("ascii")
    assert done.returncode == 0 and "Traceback" not in shown, shown
    for seed in (0, 1):
        assert steps_of(tmp_path / "runs" / f"José-seed-{seed}") == [2, 4, 6]
        assert f"runs/Jos\\xe9-seed-{seed}" in shown


@pytest.mark.long
@pytest.mark.command
def test_a_folder_that_the_locale_has_no_letters_for_may_be_worked_in(shell, tmp_path):
    """Started where only ASCII is known, with its teacher marked as needed; it goes on where UTF-8 is."""
    home = tmp_path / "José"
    student = ["mode=cd", *TINY, "teacher=runs/digits-edm", "devices=2", "schedule_steps=6"]
    for arguments in (EDM, [*student, "steps=4"], ["-m", *EDM, "name=b"]):
        done = shell(ASCII, *arguments, cwd=home)
        assert done.returncode == 0, done.stderr
    (mark,) = (home / "runs" / "digits-edm" / "checkpoints" / "step_00000006").glob(".needed_by_*")
    done = shell(BARE, *student, cwd=home)
    assert done.returncode == 0 and b"resuming at step 4" in done.stderr, done.stderr
    assert steps_of(home / "runs" / "digits-cd") == [2, 4, 6]
    assert [p.name for p in mark.parent.glob(".needed_by_*")] == [mark.name], "known by its bytes in either locale"


@pytest.mark.long
@pytest.mark.command
@pytest.mark.parametrize(
    ("environment", "word", "fix"),
    [
        pytest.param(ASCII, "name='José'", "ascii, the encoding here, has no letters for this", marks=pytest.mark.long),
        (BARE, os.fsdecode(b"name='Jos\xe9'"), "utf-8, the encoding here, has no letters for this"),
    ],
    ids=["ascii", "latin-1 in utf-8"],
)
def test_words_that_are_no_letters_are_refused_before_anything_is_made(environment, word, fix, shell, tmp_path):
    for more in ([], ["-m", "seed=0,1"]):
        done = shell(environment, *more, *EDM, word)
        (line,) = done.stderr.decode().splitlines()
        assert done.returncode == 2 and fix in line and r"Jos\udc" in line, line
        assert list(tmp_path.iterdir()) == []


def test_a_rank_tells_of_a_file_whose_name_is_no_text(monkeypatch):
    heard, spoken = os.pipe()
    monkeypatch.setenv(rank.WORDS, str(spoken))
    rank.tell(f"no such file: {os.fsdecode(b'Jos' + bytes([0xE9]))}", says_all=True)
    assert os.read(heard, 100) == b"1no such file: Jos\\udce9\0"
    os.close(heard)
    os.close(spoken)
