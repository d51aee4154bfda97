"""How long a run may take, as people say it: 30m, 8h, 20M images."""

import re
from dataclasses import dataclass
from typing import Literal, Self

from ..core.errors import InputError
from ..core.terminal import duration

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_IMAGES = {"k": 1e3, "M": 1e6, "G": 1e9}
_FORM = re.compile(r"(\d+(?:\.\d+)?)([smhdkMG])")
_MOST = 1e12  # images; beyond, steps are no exact numbers


@dataclass(frozen=True)
class Budget:
    """An amount of time, in seconds, or a number of images."""

    amount: float
    unit: Literal["s", "images"]

    @classmethod
    def parse(cls, key: str, text: str) -> Self:
        """Of the value that `key` has. Raises InputError."""
        found = _FORM.fullmatch(text.strip())
        if found is None or not 0 < float(found[1]) < _MOST:
            allowed = "a time, as 30m, 8h or 2d, or a number of images, as 500k or 20M"
            raise InputError(f"can't read {key}", text, allowed)
        number, unit = float(found[1]), found[2]
        if unit in _SECONDS:
            return cls(number * _SECONDS[unit], "s")
        return cls(number * _IMAGES[unit], "images")

    def less(self, part: "Budget") -> "Budget":
        """What is left without a part of it."""
        return Budget(self.amount - part.amount, self.unit)

    def __str__(self) -> str:
        return duration(self.amount) if self.unit == "s" else f"{self.amount:,.0f} images"
