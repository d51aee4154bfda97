"""FD, the Fréchet distance on any features."""

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
        return few(min(len(samples), 2 if real.seen is None else len(real.seen)), 2)

    def measure(self, samples: Seen, real: Real) -> dict[str, float]:
        seen = real.seen
        # A covariance of more features than images is the larger table of the two.
        is_wide = seen is not None and seen.features.shape[1] > len(seen)
        others = seen.features if seen is not None and is_wide else real.statistics
        return {self.config.name: frechet_distance(samples.features, others)}
