"""The table of checks: a row is printed and stored when it is made, and a deadline leaves the table whole."""

import fnmatch
import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

_GRACE_S = 20.0  # for a row to notice that its time is over, before the process is ended


class Skipped(Exception):
    """Why a row could not be made."""


class OutOfTime(BaseException):
    """The deadline of a part has passed; not an Exception, so that no row takes it for a failure of its own."""


@dataclass(frozen=True)
class Scale:
    """How large the checks are."""

    gpu: bool
    compiled: bool  # whether rows that compile are made
    full: bool
    home: Path  # for whatever is made on the way
    out: Path
    data: Path | None  # a folder that holds MNIST's

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    def needs_gpu(self) -> None:
        """Skip a row that shows nothing on a CPU. Raises Skipped."""
        if not self.gpu:
            raise Skipped("is about a GPU")

    def needs_compiler(self) -> None:
        """Skip a row that compiles, where that was not wanted. Raises Skipped."""
        if not self.compiled:
            raise Skipped("without the compiler, as --cpu is")


class Table:
    """The rows so far, on the terminal and in `out`/gpu_check.json.

    Args:
        only: names of rows to make, with wildcards.
    """

    def __init__(self, out: Path, only: str, machine: dict[str, Any]):
        self.rows: list[dict[str, Any]] = []
        self._file, self._only, self._machine = out / "gpu_check.json", only, machine
        self._part, self._ends, self._doing = "", float("inf"), ""
        self._store()

    def row(self, name: str, check: Callable[[], dict[str, Any]]) -> None:
        """Make a row of what `check` returns; an exception is a failed row, and the next one is made all the same."""
        if not fnmatch.fnmatch(name, self._only):
            return
        if time.monotonic() >= self._ends:
            self._add(name, 0.0, ok=False, skipped="no time left")
            return
        began = time.monotonic()
        result = self._made(name, check)
        self._add(name, time.monotonic() - began, **result)

    def _made(self, name: str, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What there is to say of a row. The deadline cuts in while `_doing` is set, and nowhere else."""
        try:
            try:
                self._doing = name
                return {"ok": True, **check()}
            finally:
                self._doing = ""
        except Skipped as reason:
            return {"ok": False, "skipped": str(reason)}
        except Exception as error:
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            return {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        except OutOfTime:
            return {"ok": False, "skipped": "cut by the deadline"}

    @contextmanager
    def part(self, name: str, seconds: float | None) -> Iterator[None]:
        """The rows of part `name`, which take `seconds` at most; None: as long as they take."""
        self._part, self._ends = name, float("inf")
        if seconds is None:
            yield
            return
        self._ends = time.monotonic() + seconds
        before = signal.signal(signal.SIGALRM, self._cut)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second, where the first was swallowed
        # A compiler or a kernel that never comes back to Python can't be told; the table must be whole all the same.
        hard = threading.Timer(seconds + _GRACE_S, self._end_hard)
        hard.daemon = True
        hard.start()
        try:
            yield
        finally:
            hard.cancel()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @property
    def failed(self) -> bool:
        """Whether some row was made and is not as it should be."""
        return any(not row["ok"] and "skipped" not in row for row in self.rows)

    def _cut(self, number: int, frame: FrameType | None) -> None:
        if self._doing:
            raise OutOfTime

    def _end_hard(self) -> None:
        self._add(self._doing or "between two rows", 0.0, ok=False, error="did not come back after the deadline")
        os._exit(1)

    def _add(self, name: str, seconds: float, **values: Any) -> None:
        # JSON knows no NaN.
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        row = {"part": self._part, "name": name, "ok": values.pop("ok"), "seconds": round(seconds, 2), **values}
        self.rows.append(row)
        self._store()
        state = "ok" if row["ok"] else "skipped" if "skipped" in row else "FAILED"
        rest = ", ".join(f"{k} {_short(v)}" for k, v in values.items())
        print(f"{self._part:8}{state:8}{seconds:7.1f} s  {name}: {rest}", flush=True)

    def _store(self) -> None:
        beside = self._file.with_suffix(".writing")
        beside.write_text(json.dumps({**self._machine, "rows": self.rows}, indent=1) + "\n")
        os.replace(beside, self._file)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
