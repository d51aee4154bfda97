"""Reasons to stop, read between two steps of training or of other long work: signals, a deadline, a parent's word."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

# SIGXCPU is how a soft limit of processor time (ulimit -S -t) warns before the hard one kills.
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# What clusters send a moment before they end a job. Ranks start with these blocked and StopFlag lets them in: one that
# comes while Python is still starting waits, where its default would end the rank.
EARLY = (signal.SIGUSR1, signal.SIGUSR2)

_ONE_SIGNAL_S = 1.0  # within which signals are one
_OVER = 0  # which is no signal
_flags: list["StopFlag"] = []  # those that are in force now


@contextmanager
def answered() -> Iterator[None]:
    """For a command that saves before it stops: says so as soon as a signal comes, once, on rank 0 alone.

    In a thread: Python's own handlers wait for what the main thread is in, as for all of a backward pass.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread = threading.Thread(target=_answer, args=(heard,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        with suppress(OSError):
            os.write(told, bytes([_OVER]))
        thread.join()
        os.close(told)
        os.close(heard)


def _answer(heard: int) -> None:
    while (number := os.read(heard, 1)[0]) not in CAUGHT:
        if number == _OVER:
            return
    # Now rather than before the first moment in which a signal is heeded.
    from .launched import is_follower
    from .terminal import has_cursor, live_bars, say

    if is_follower():
        return
    if has_cursor(sys.stderr) and not live_bars:  # the ^C of a terminal, or the bar of a rank, is in the way
        with suppress(OSError):
            os.write(sys.stderr.fileno(), b"\n")
    again = "; Ctrl-C again quits without" if number == signal.SIGINT else ""
    say(f"stopping as soon as everything is saved{again}")


class Stopped(BaseException):
    """There is a reason to stop. No Exception: whoever takes any failure of a file for damage must let it through."""


def heed() -> None:
    """For long work outside of training, in its every round: raises Stopped where this process is to stop."""
    if any(flag() for flag in _flags):
        raise Stopped


class StopFlag:
    """Callable: True once there is a reason to stop. A SIGINT a second or more after that quits at once.

    Sooner it means the same: terminals and wrappers send it twice, or after a SIGTERM.

    Args:
        deadline: seconds as time.monotonic() counts them, the same for all processes of a machine: no change of the
            clock on the wall moves it.
        file: stops as soon as this exists.

    `caught` has the numbers of the signals that came.
    """

    def __init__(self, deadline: float | None = None, file: Path | None = None) -> None:
        self.deadline, self.file = deadline, file
        self.caught: set[int] = set()
        self._caught_at = 0.0

    def __call__(self, reserve_s: float = 0.0) -> bool:
        """Whether to stop now; `reserve_s` is what one more step and a save would take."""
        late = self.deadline is not None and time.monotonic() + reserve_s >= self.deadline
        return bool(self.caught) or late or (self.file is not None and self.file.exists())

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.caught:
            self._caught_at = now
        elif number == signal.SIGINT and now - self._caught_at >= _ONE_SIGNAL_S:
            raise KeyboardInterrupt
        self.caught.add(number)

    def __enter__(self) -> "StopFlag":
        # What nohup has this command ignore is meant to be ignored.
        heeded = [s for s in CAUGHT if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._before: dict[int, Any] = {s: signal.signal(s, self._catch) for s in heeded}
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        _flags.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _flags.remove(self)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)
