"""A tracker outside of the run folder, kept away from training by a thread of its own."""

import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ...core.terminal import complain, say
from .names import shown

PATIENCE_S = 30.0  # at the end of a run, for what is still queued
HURRY_S = 5.0  # the same where a run is stopped early
_SILENT_S = 2.0  # of waiting without a word


class Backend(ABC):
    """Takes values and pictures at once and hands them on in a thread: nothing in it can block or end a run.

    A subclass calls `super().__init__()` last, since the thread starts there.
    """

    name: ClassVar[str]
    rest = "metrics.jsonl has everything"  # to be said of what was not finished
    patience_s = PATIENCE_S

    def __init__(self) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._given_up, self._said = False, ""
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    @abstractmethod
    def _open(self) -> None:
        """Begin; in the thread, as are all the following."""

    @abstractmethod
    def _log(self, values: Mapping[str, Any]) -> None:
        """The values of `values["step"]`, by the names of `names.shown`; None where nothing finite was seen."""

    @abstractmethod
    def _image(self, name: str, path: Path, step: int) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    def log(self, values: Mapping[str, Any]) -> None:
        """Hand on the values of a step, by their names in metrics.jsonl."""
        values = {shown(name): value for name, value in values.items()}
        self._queue.put(lambda: self._log(values))

    def image(self, name: str, path: Path, step: int) -> None:
        """Hand on a picture that lies at `path`."""
        self._queue.put(lambda: self._image(shown(name), path, step))

    @abstractmethod
    def model(self, name: str, files: Mapping[str, Path | str]) -> None:
        """Hand on a finished run's weights, where that was asked for and the tracker keeps any.

        Args:
            files: each one's name and its path, or its text.
        """

    def close(self, at_end: bool = True, give_up: Callable[[], bool] = lambda: False) -> None:
        """Finish what is queued, with some patience.

        Args:
            at_end: whether the run is finished; who stops early is in a hurry.
            give_up: asked on the way; whether there is a hurry now.
        """
        self._queue.put(None)
        began, told = time.monotonic(), False
        while self._thread.is_alive():
            waited = time.monotonic() - began
            patience = self.patience_s if at_end and not give_up() else min(HURRY_S, self.patience_s)
            if waited >= patience:
                self._given_up = True
                complain(f"{self.name} was not finished within {patience:.0f} s; {self.rest}")
                break
            if waited > _SILENT_S and not told:
                say(f"waiting for {self.name}, {patience:.0f} s at most")
                told = True
            self._thread.join(0.1)

    def _work(self) -> None:
        is_open = self._try(self._open, f"{self.name} is off")
        while (job := self._queue.get()) is not None:
            if is_open:
                self._try(job, self.name)
        if is_open:
            self._try(self._finish, self.name)

    def _try(self, job: Callable[[], None], what: str) -> bool:
        try:
            job()
        except Exception as error:
            self._complain(what, error)
            return False
        return True

    def _complain(self, what: str, error: Exception) -> None:
        text = f"{what}: {type(error).__name__}: {str(error).partition(os.linesep)[0]}"
        if not self._given_up and text != self._said:  # the same at every step would bury all else
            complain(text)
        self._said = text
