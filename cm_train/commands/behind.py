"""Beside what is being computed, each in a thread of its own: writing what came before, and making what comes next."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

A = TypeVar("A")
B = TypeVar("B")

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


def ahead(make: Callable[[A], B], items: Iterable[A]) -> Iterator[tuple[A, B]]:
    """Each item with what `make` makes of it: in another thread, an item ahead of the caller. Raises as `make` does."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        waiting: tuple[A, Future[B]] | None = None
        for item in items:
            ready, waiting = waiting, (item, thread.submit(make, item))
            if ready is not None:
                yield ready[0], ready[1].result()
        if waiting is not None:
            yield waiting[0], waiting[1].result()
