"""What every metric offers: numbers that say how generated images differ from real ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, TypeVar

from ...core import rng
from ...core.registry import ComponentConfig
from ..features.base import version_of
from ..gaussian import Gaussian
from ..seen import Seen

T = TypeVar("T")


class MetricConfig(ComponentConfig):
    """One of the `metrics`."""

    kind: ClassVar = "metric"


@dataclass(frozen=True)
class Real:
    """What generated images are compared with.

    Attributes:
        features: the name of the extractor that has looked at all of them.
        seen: the reference's images; None where nothing but statistics is known.
        given: the reference's statistics in that case.
        held_out: images of the same kind that the model was not trained on, where the reference is what it was.
    """

    features: str
    seen: Seen | None
    given: Gaussian | None = None
    held_out: Seen | None = None
    _known: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def statistics(self) -> Gaussian:
        """Of the reference's features."""
        if self.given is not None:
            return self.given
        assert self.seen is not None
        seen = self.seen
        return self.once("statistics", lambda: Gaussian.of(seen.features))

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returns, made once: the real images stay the same while many models are compared with them."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found


class Metric(ABC):
    """Built as `cls(config)`.

    Attributes:
        numbers: their names, and which of two values is the better one.
        unbiased: those of its numbers that mean the same of few images as of many, so that some held-out pictures in
            the place of generated ones tell what real ones score.
        suits_real: whether held-out pictures can stand for generated ones at all.
        version: raised where the same settings and images would have another number.
        package: what it needs beside this project's own.
    """

    numbers: ClassVar[Mapping[str, Literal["lower", "higher"]]]
    unbiased: ClassVar[frozenset[str]] = frozenset()
    suits_real: ClassVar[bool] = True
    version: ClassVar[int] = 1
    package: ClassVar[str | None] = None

    def __init__(self, config: Any):
        self.config = config

    def lacks(self, samples: Seen, real: Real) -> str | None:
        """Why it can't be measured on these, in words; None where it can."""
        if self.package is not None and find_spec(self.package.replace("-", "_")) is None:
            return f"it needs the package {self.package}: pip install 'cm-train[eval]'"
        return None if real.seen is not None else "it compares images, and the reference is statistics"

    def made_with(self) -> dict[str, str]:
        """The versions of the packages, beside torch, that its numbers may hang on."""
        return {} if self.package is None else version_of(self.package)

    def settings(self) -> dict[str, Any]:
        """What makes its numbers comparable, for a protocol."""
        return {**self.config.model_dump(exclude={"name"}), "version": self.version}

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
