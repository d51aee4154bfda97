"""Lines on the terminal, and the silence that --quiet asks for."""

import atexit
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from .errors import printable
from .run_log import note
from .wrapping import fitted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_QUIET = "CM_TRAIN_QUIET"  # in the environment, since a run's ranks are processes of their own
_LABEL, _PART = "CM_TRAIN_LABEL", "CM_TRAIN_PART"
live_bars: list["Progress"] = []  # what is on the terminal now, the newest last


def silence() -> None:
    """From here on this process and those that it starts show errors only."""
    os.environ[_QUIET] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore"
    warnings.simplefilter("ignore")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """While something is tried out, here and in ranks: only errors are shown."""
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = before


def is_quiet() -> bool:
    """Whether only errors may be shown."""
    return os.environ.get(_QUIET, "0") not in ("", "0")


@contextlib.contextmanager
def labelled(label: str) -> Iterator[None]:
    """For a job beside others on one terminal: its lines, its ranks' too, begin with `label`, and it draws no bar."""
    os.environ[_LABEL] = label
    try:
        yield
    finally:
        del os.environ[_LABEL]


def is_shared() -> bool:
    """Whether others write on this terminal at the same time."""
    return _LABEL in os.environ


@contextlib.contextmanager
def in_parts() -> Iterator[None]:
    """Around what a command may do in parts, one run after another: `begin_part` says which, until the end of this."""
    try:
        yield
    finally:
        os.environ.pop(_PART, None)


def begin_part(label: str) -> None:
    """From here on this process and its ranks show beside what they do that it is e.g. "2 of 2"."""
    os.environ[_PART] = label


def part() -> str:
    """What `begin_part` was told, in brackets; empty where a command does one thing."""
    return f"({os.environ[_PART]})" if _PART in os.environ else ""


def say(text: str) -> None:
    """One line on the terminal, above the bar where one is live; none where the user wants it quiet."""
    if is_quiet():
        note(text)
    else:
        complain(text)


def complain(text: str) -> None:
    """`say` for what went wrong: shown to those too who want it quiet."""
    from rich.console import Console

    note(text)
    put(text, live_bars[-1].console if live_bars else Console(stderr=True))


def put(text: str, console: "Console") -> None:
    """One line of plain text on `console`; several where a terminal is too narrow for it."""
    with contextlib.suppress(OSError, SystemExit):  # a full disk or a closed pipe behind stderr must not end a run
        label = f"[{os.environ[_LABEL]}] " if is_shared() else ""
        line = fitted(printable(label + text), console.width if console.is_terminal else None)
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _let_go_of_stderr() -> None:
    """At the exit: what stderr can't take any more, on a full disk, shall not change the exit code (to 120)."""
    with contextlib.suppress(Exception):
        try:
            sys.stderr.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


atexit.register(_let_go_of_stderr)


def has_cursor(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which a bar can move; one that nobody has named may print what moves it."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def restore_cursor() -> None:
    """Begin a new line and show the cursor, on a terminal whose progress bar ended without doing so."""
    if has_cursor(sys.stderr):
        with contextlib.suppress(OSError):
            print("\x1b[?25h", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
