"""Reasons to stop that the trainer reads between two steps: signals, a deadline, and the word of a parent."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopFlag:
    """Callable: True once there is a reason to stop. A second SIGINT quits at once.

    Args:
        deadline: seconds since the epoch, as time.time() counts.
        file: stops as soon as this exists.
    """

    def __init__(self, deadline: float | None = None, file: Path | None = None) -> None:
        self.deadline, self._file = deadline, file
        self._asked = False

    def __call__(self, reserve_s: float = 0.0) -> bool:
        """Whether to stop now; `reserve_s` is what one more step and a save would take."""
        late = self.deadline is not None and time.time() + reserve_s >= self.deadline
        return self._asked or late or (self._file is not None and self._file.exists())

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def __enter__(self) -> "StopFlag":
        self._before: dict[int, Any] = {s: signal.signal(s, self._catch) for s in _CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
