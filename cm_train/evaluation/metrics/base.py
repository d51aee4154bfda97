"""What every metric offers: numbers that say how generated images differ from real ones."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...core import rng
from ...core.registry import ComponentConfig
from ..gaussian import Gaussian
from ..seen import Seen


class MetricConfig(ComponentConfig):
    """One of the `metrics`."""

    kind: ClassVar = "metric"


@dataclass(frozen=True)
class Real:
    """What generated images are compared with.

    Attributes:
        features: the name of the extractor that has looked at all of them.
        statistics: of the reference's features.
        seen: the reference's images; None where nothing but statistics is known.
        held_out: images of the same kind that the model was not trained on, where the reference is what it was.
    """

    features: str
    statistics: Gaussian
    seen: Seen | None = None
    held_out: Seen | None = None


class Metric(ABC):
    """Built as `cls(config)`.

    Attributes:
        numbers: their names, and which of two values is the better one.
        suits_real: whether held-out pictures can stand for generated ones.
    """

    numbers: ClassVar[Mapping[str, Literal["lower", "higher"]]]
    suits_real: ClassVar[bool] = True

    def __init__(self, config: Any):
        self.config = config

    def lacks(self, samples: Seen, real: Real) -> str | None:
        """Why it can't be measured on these, in words; None where it can."""
        return None if real.seen is not None else "it compares images, and the reference is statistics"

    def made_with(self) -> dict[str, str]:
        """The versions of the packages, beside torch, that its numbers may hang on."""
        return {}

    @abstractmethod
    def measure(self, samples: Seen, real: Real) -> Mapping[str, float]:
        """Its numbers by name; called where nothing is lacking."""


def some_of(seen: Seen, most: int) -> Seen:
    """All, or `most` of them where there are more: always the same ones."""
    if len(seen) <= most:
        return seen
    return seen.rows(rng.permutation(0, "some of the real", 0, len(seen))[:most].sort().values)


def few(num: int, least: int) -> str | None:
    """What is lacking where there are fewer images than a metric takes."""
    return None if num >= least else f"it takes {least} images, and there are {num}"
