"""How long a rank waits for the others: counted in time in which it could run."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TICK_S = 1.0


class Watch:
    """Calls `expired`, in a thread of its own, when one wait has taken `patience_s`.

    Time counts while this process can run: a job that is suspended (SIGSTOP, a laptop asleep) is no job that hangs,
    and the libraries' own timeouts can't tell the two apart.
    """

    def __init__(self, patience_s: float, expired: Callable[[], None]):
        self._patience_s, self._expired = patience_s, expired
        self._wait: list[float] | None = None  # the seconds that the present wait has taken so far
        threading.Thread(target=self._count, name="watch", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around each wait for another rank."""
        outer, self._wait = self._wait, [0.0]
        try:
            yield
        finally:
            self._wait = outer

    def _count(self) -> None:
        tick = min(_TICK_S, self._patience_s / 10)
        then = time.monotonic()
        while True:
            time.sleep(tick)
            now, wait = time.monotonic(), self._wait
            if wait is not None:
                wait[0] += min(now - then, 2 * tick)  # what is beyond that it spent suspended
                if wait[0] > self._patience_s:
                    self._expired()
                    return
            then = now
