"""`metrics.jsonl`: one JSON object a line, cut back to the resumed step when a run goes on."""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.files import not_through_a_link, patiently

_MOST_BYTES = 1 << 20  # of one line
_TAIL_BYTES = 1 << 20  # of a file, for its last lines


class MetricsFile:
    """The open file of a run that starts at `step`. Raises InputError where it can't be one."""

    def __init__(self, path: Path, step: int):
        try:
            patiently(lambda: _cut(path, step))
            self._file = open(path, "ab", buffering=0, opener=not_through_a_link)  # noqa: SIM115 - as long as the run
        except OSError as error:
            raise InputError(f"can't write {path}: {error.strerror}", fix="look what it is, and move it away") from None
        self._lock = threading.Lock()
        self._waiting = b""  # lines that a full disk did not take yet

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line, whole or not yet. Raises OSError on a full disk; the next call tries again."""
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._waiting += line
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            size = self._file.seek(0, os.SEEK_END)
            try:
                if self._waiting and self._file.write(self._waiting) != len(self._waiting):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting = b""
            except OSError:
                self._file.truncate(size)
                raise

    def sync(self) -> None:
        """Force the lines to the disk, before a checkpoint that counts on them appears; from any thread."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        self._file.close()


def _cut(path: Path, step: int) -> None:
    """Leave the lines until `step`, and nothing after one that is torn: that is later than any checkpoint."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b", opener=not_through_a_link) as file:
        kept = 0
        while line := file.readline(_MOST_BYTES):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            kept += len(line)
        file.truncate(kept)
        os.fsync(file.fileno())


def values_of(path: Path, name: str) -> list[tuple[int, float]]:
    """Every step of a metrics.jsonl that has a number of that name, and the number; empty where nothing can be read."""
    found: list[tuple[int, float]] = []
    with contextlib.suppress(OSError), open(path, "rb", opener=not_through_a_link) as file:
        while line := file.readline(_MOST_BYTES):
            with contextlib.suppress(ValueError, AttributeError, RecursionError, KeyError):
                values = json.loads(line)
                if isinstance(values.get(name), int | float):
                    found.append((int(values["step"]), float(values[name])))
    return found


def last_values(path: Path) -> dict[str, float]:
    """For every name in the last lines of a metrics.jsonl its newest number; empty where nothing can be read."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):
        with open(path, "rb", opener=not_through_a_link) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
        for line in lines:
            with contextlib.suppress(
                ValueError, AttributeError, RecursionError
            ):  # torn by a crash, or by where reading began
                found |= {k: v for k, v in json.loads(line).items() if isinstance(v, int | float)}
    return found
