"""What cm-sample is told: its keys, typed, and what several of them mean together."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..core.errors import InputError
from ..core.settings import Count, Settings, Text, excerpt
from .boundaries import BatchSize
from .sample_folder import Precision

USUAL_NUM, USUAL_BATCH = 64, 256

_SEEDS = re.compile(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", re.ASCII)


class SampleConfig(Settings):
    """The keys of cm-sample."""

    ckpt: Text
    num: Annotated[int, Field(ge=1)] | None
    seed: Annotated[int, Field(ge=0)] | None
    seeds: int | str | None
    steps: Annotated[int, Field(ge=1)] | None
    sigmas: list[float] | None
    sampler: str
    weights: Text
    labels: int | str | list[int | str] | None
    guidance: Annotated[float, Field(ge=0)]
    batch_size: BatchSize | None
    out: Text | None
    format: Literal["png", "npz"]
    device: str
    devices: Count | Literal["auto"] = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    plugins: list[Text] = []

    @field_validator("sampler")
    @classmethod
    def _is_known(cls, value: str) -> str:
        from ..sampling.choosing import check_sampler

        check_sampler(value)
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _names_or_numbers(cls, value: Any) -> Any:
        for label in value if isinstance(value, list) else [value]:
            if isinstance(label, bool | float):
                raise ValueError(
                    f"a class is a name or a number; got {label}; fix: a name that looks like that in quotes"
                )
        return value

    def first_and_count(self) -> tuple[int, int]:
        """The seed of the first image and how many there are. Raises InputError where `seeds` says neither."""
        if self.seeds is None:
            return (0 if self.seed is None else self.seed), (USUAL_NUM if self.num is None else self.num)
        first, count = parse_seeds(self.seeds)
        for key, given, meant in (("seed", self.seed, first), ("num", self.num, count)):
            if given not in (None, meant):
                got = f"seeds={self.seeds} and {key}={given}"
                raise InputError(f"seeds and {key} disagree", got, fix=f"drop {key}=, or seeds=")
        return first, count


class RedrawConfig(Settings):
    """The keys of cm-sample from=...: the picture itself says all the others."""

    picture: Text = Field(alias="from")
    ckpt: Text | None
    out: Text | None
    device: str
    plugins: list[Text]


def parse_seeds(seeds: int | str) -> tuple[int, int]:
    """The first of seeds, and how many: 100-199 is (100, 100), 7 is (7, 1). Raises InputError."""
    found = _SEEDS.fullmatch(str(seeds))
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if first > last:
        allowed = "a first and a last seed as 100-199, or one seed"
        raise InputError("seeds can't be read", excerpt(seeds), allowed, "-m seeds=0-63,1000-1063 for a folder of each")
    return first, last - first + 1
