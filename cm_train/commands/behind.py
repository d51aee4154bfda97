"""Writing in a thread of its own, behind what is being computed."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

_MOST_WAITING = 2  # calls, with what they hold in memory


class Behind:
    """As a context: `put(...)` has `write(...)` called in another thread, in order, while the caller goes on.

    The context ends once all is written, be it by an error or a signal; but a Ctrl-C that is to quit at once does not
    wait. What `write` raises, `put` or the end of the context raises; nothing is written after it.
    """

    def __init__(self, write: Callable[..., object]):
        self._write = write
        self._waiting: queue.Queue[tuple[Any, ...] | None] = queue.Queue(_MOST_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writing", daemon=True)

    def put(self, *values: Any) -> None:
        """Have `write(*values)` called; waits while too many are waiting already."""
        if self._error is not None:
            raise self._error
        self._waiting.put(values)

    def _work(self) -> None:
        while (values := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    self._write(*values)
                except BaseException as error:  # the caller's to handle
                    self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None and error is not self._error:
            raise self._error
