"""Fréchet distances: FD on any features, FID on those that it is defined on."""

from typing import Literal

from ...core.registry import register
from ..seen import Seen
from .base import Metric, MetricConfig, Real, few
from .frechet import frechet_distance


@register
class FD(Metric):
    """See `frechet_distance`. With DINOv2's features it is what Stein et al. 2023 call FD_DINOv2."""

    numbers = {"fd": "lower"}

    class Config(MetricConfig):
        name: Literal["fd"] = "fd"

    def lacks(self, samples: Seen, real: Real) -> str | None:
        return few(len(samples), 2)

    def measure(self, samples: Seen, real: Real) -> dict[str, float]:
        return {self.config.name: frechet_distance(samples.features, real.statistics)}


@register
class FID(FD):
    """The Fréchet inception distance: Heusel et al. 2017 (arXiv:1706.08500)."""

    numbers = {"fid": "lower"}

    class Config(MetricConfig):
        name: Literal["fid"] = "fid"

    def lacks(self, samples: Seen, real: Real) -> str | None:
        if real.features != "inception":
            return f"it is defined on features=inception; fd is the same on {real.features}"
        return super().lacks(samples, real)
