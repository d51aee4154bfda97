"""FID, the Fréchet distance on the features that it is defined on."""

from typing import Literal

from ...core.registry import register
from ..seen import Seen
from .base import MetricConfig, Real
from .fd import FD


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
