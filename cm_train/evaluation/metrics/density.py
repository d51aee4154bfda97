"""Density and coverage: precision and recall that one odd image among the real ones can't spoil."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from ...core.registry import register
from ..nearest import distances, nearest
from ..seen import Seen
from .base import Metric, MetricConfig, Real, few, some_of


@register
class Density(Metric):
    """Naeem et al. 2020 (arXiv:2002.09797), eq. 3 and 4.

    density: in how many real images' neighbourhoods a generated one lies, over k; about 1 for real ones.
    coverage: the share of real images with a generated one in their neighbourhood.
    """

    numbers = {"density": "higher", "coverage": "higher"}
    unbiased = frozenset(["density"])

    class Config(MetricConfig):
        name: Literal["density"] = "density"
        neighbours: Annotated[int, Field(ge=1)] = 5
        num_real: Annotated[int, Field(ge=2)] = 10_000  # of the reference at most: all distances among them are needed

    def lacks(self, samples: Seen, real: Real) -> str | None:
        return super().lacks(samples, real) or few(len(real.seen or ()), self.config.neighbours + 1)

    def measure(self, samples: Seen, real: Real) -> dict[str, float]:
        assert real.seen is not None
        k, there = self.config.neighbours, some_of(real.seen, self.config.num_real).features
        key = "density", k, self.config.num_real
        radius = real.once(key, lambda: nearest(there, there, k + 1).distance[:, k])  # the first is the image itself
        num_within, closest = 0, torch.full((len(there),), torch.inf)
        for _, rows in distances(samples.features, there):
            num_within += int((rows < radius).sum())
            closest = torch.minimum(closest, rows.amin(0))
        return {
            "density": num_within / (k * len(samples)),
            "coverage": (closest < radius).float().mean().item(),
        }
