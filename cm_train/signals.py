"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 as a flag that the trainer reads between two steps."""

import signal
from types import FrameType
from typing import Any

_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopFlag:
    """Callable: True once a signal asked to stop. A second SIGINT quits at once."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def set(self) -> None:
        """Ask to stop."""
        self._asked = True

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
