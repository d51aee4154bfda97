"""What a terminal of 80 columns shows: every word in one piece, whatever the commands print."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from cm_train.core import progress as progress_bar
from cm_train.core.progress import Progress
from cm_train.core.terminal import say
from cm_train.core.wrapping import columns_of, fitted
from cm_train.training.tracking.training_progress import TrainingProgress
from conftest import ENVIRONMENT, TINY

_CURSOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short", ["short"]),
        ("one two three four", ["one two", "  three", "  four"]),
        ("  a  bb  cccc dddd", ["  a  bb", "    cccc", "    dddd"]),
        ("see /a/very/long/path ok", ["see", "/a/very/long/path", "  ok"]),
        ("run 'ckpt=a b c' now", ["run", "'ckpt=a b c'", "  now"]),
        ("run ckpt='a b c' now", ["run", "ckpt='a b c'", "  now"]),
        ("can't do what isn't", ["can't do", "  what", "  isn't"]),
        ("日本語 日本語", ["日本語", "  日本語"]),
        ("one\n\ntwo three", ["one", "", "two three"]),
    ],
)
def test_lines_are_broken_between_words(text, lines):
    assert fitted(text, 9).split("\n") == lines
    assert fitted(text, None) == text


@given(st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" '")), st.integers(1, 30))
def test_every_word_is_whole_and_only_one_that_must_be_is_too_long(text, columns):
    broken = fitted(text, columns)
    assert broken.split() == text.split()
    for line in broken.split("\n"):
        quoted = re.fullmatch(r"\s*\S*'.*'\S*", line)
        assert cell_len(line) <= columns or len(line.split()) <= 1 or quoted


class Screen(io.StringIO):
    def isatty(self):
        return True


def frames(text):
    """The rows that stood on a terminal, one after the other."""
    return [row for row in re.split(r"[\r\n]+", _CURSOR.sub("", text)) if row.strip()]


def test_columns_are_the_terminals(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert columns_of(io.StringIO()) is None
    assert columns_of(Screen()) == 80
    monkeypatch.setenv("COLUMNS", "0")
    assert columns_of(Screen()) == 80
    monkeypatch.setenv("COLUMNS", "132")
    assert columns_of(Screen()) == 132


def test_a_bar_is_what_gets_shorter_where_a_line_is_full(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress_bar, "_BAR_AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", Screen())
    training = TrainingProgress(400_000, 123_456)
    say(" ".join(["word"] * 40))
    training.step(123_506)
    training.values({"loss": 0.0001234, "images_per_s": 12345.0, "steps_per_s": 0.7, "skipped": 12})
    training.close()
    with Progress(1_281_167, "measuring contrast, images") as bar:
        bar.update(1_281_160, "shown")
    rows = frames(sys.stderr.getvalue())
    assert max(map(len, rows)) <= 80 and not [row for row in rows if "…" in row]
    for whole in ("123506/400000", "loss 0.0001234  12345 images/s  12 skipped", "1281160/1281167", "shown"):
        assert any(whole in row for row in rows), whole


@pytest.fixture
def on_screen(warm, tmp_path):
    """on_screen("train", ...) -> the rows that the command shows on a terminal of 80 columns."""

    def run(name, *arguments):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
        taken = []

        def read():
            try:
                while some := os.read(master, 1 << 16):
                    taken.append(some)
            except OSError:  # all ends are closed
                pass

        reader = threading.Thread(target=read)
        reader.start()
        env = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
        argv = ["-m", f"cm_train.commands.{name}", *arguments]
        process = warm.popen(argv, env=env, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        process.wait(timeout=120)
        reader.join(10)
        os.close(master)
        return frames(b"".join(taken).decode())

    return run


LONG = "runs/a-folder-that-has-a-rather-long-name-as-those-of-sweeps-do/and-another-one-in-it-${seed}"
RUN = LONG.replace("${seed}", "1")
OUT = "samples-" + "x" * 100
COMMANDS = [  # with words that must be whole; None: all words that they print elsewhere
    ("train", ["-m", "mode=ict", *TINY, "seed=1,2", f"run_dir={LONG}"], {RUN, "seed=2", f"ckpt={RUN}", "float32;"}),
    ("sample", [RUN, "num=6", "batch_size=2", f"out={OUT}"], {f"{RUN}/checkpoints/step_00000006,", f"{OUT}:", "(6"}),
    ("train", ["mode=ict", "dataset=cifar"], None),
    ("train", ["--why", "dataset", "steps", "run_dir", f"run_dir={LONG}"], None),
    ("train", ["--help"], None),
    ("sample", ["--help"], None),
]


def test_no_word_is_broken_on_a_screen_of_80_columns(on_screen, command):
    for name, arguments, words in COMMANDS:
        rows = on_screen(name, *arguments)
        for row in rows:  # the terminal would break longer ones just there
            assert len(row) <= 80 or len(row.split()) == 1, row
        if words is None:
            elsewhere = command(name, *arguments)
            words = {*elsewhere.stdout.split(), *elsewhere.stderr.split()}
        assert words and words <= {word for row in rows for word in row.split()}, arguments
