"""The numbers of one model or one set of images, with their protocol: `eval.json`."""

import json
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.files import may_pass, read_small, unreadable, write_whole
from ..core.settings import Settings, excerpt, typed
from .protocol import Protocol

EVAL = "eval.json"
_MOST_BYTES = 1 << 20


class Number(Settings):
    """One number: its mean and deviation, and the values of the blocks where they are over blocks."""

    mean: float
    std: float | None  # None of a single value
    values: list[float]

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.std is None else f" ± {self.std:.2g}")


class Result(Settings):
    """What `cm-eval` found.

    Attributes:
        metrics: numbers by name, as "kid" or "precision".
        real: the same of held-out pictures in the place of generated ones, where there are any; and how many they are.
        notes: what a reader should know of them.
    """

    metrics: dict[str, Number]
    protocol: Protocol
    real: dict[str, float] = {}
    num_real: int = 0
    notes: list[str] = []

    def write(self, folder: Path) -> None:
        """`eval.json` in `folder`, whole or not at all. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / EVAL, (json.dumps(self.model_dump(), indent=1) + "\n").encode())


def read_result(path: Path) -> Result:
    """What `Result.write` wrote. Raises InputError where it is none."""
    try:
        values: Any = json.loads(read_small(path, _MOST_BYTES).decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return typed(Result, values)
    except (OSError, ValueError, RecursionError) as error:  # InputError is a ValueError
        if may_pass(error):
            raise unreadable(path, error) from None
        raise InputError(f"{path} is none of cm-eval's", excerpt(error)) from None
