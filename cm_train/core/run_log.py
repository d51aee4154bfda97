"""What a run says, kept in its folder: each line with its time, warnings and tracebacks too."""

import os
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError, TrainingFailed, printable
from .files import not_through_a_link

_open: list[Path] = []  # the logs of the runs that are under way in this process, the innermost last


def note(text: str) -> None:
    """Add `text` to the log of the run that is under way, where there is one; a disk that is full ends nothing."""
    if not _open:
        return
    lines = "".join(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(line)}\n" for line in text.splitlines())
    with suppress(OSError):
        # Opened each time: ranks write to it too, and somebody may have moved it away, as those do who keep logs short.
        handle = not_through_a_link(str(_open[-1]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, lines.encode(errors="backslashreplace"))
        finally:
            os.close(handle)


def log_from_here_on(path: Path) -> None:
    """In a process that has one run to its end: what is said goes to `path` too."""
    _open.append(path)
    show = warnings.showwarning

    def show_and_note(*args: Any, **kwargs: Any) -> None:
        show(*args, **kwargs)
        note(f"warning: {args[0]}")

    warnings.showwarning = show_and_note


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """While a run is under way: what is said goes to `path` too, and what ends it."""
    show = warnings.showwarning
    log_from_here_on(path)
    try:
        yield
    except (InputError, TrainingFailed) as error:
        note(f"ended: {error}")
        raise
    except Exception:
        note(traceback.format_exc())
        raise
    finally:
        warnings.showwarning = show
        _open.remove(path)
