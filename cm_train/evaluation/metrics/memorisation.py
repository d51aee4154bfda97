"""Memorisation: whether generated images lie nearer to training images than pictures do that nobody trained on."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.registry import register
from ..nearest import nearest
from ..seen import Seen
from .base import Metric, MetricConfig, Real, few

_LEAST_HELD_OUT = 20


@register
class Memorisation(Metric):
    """Distances to the nearest training image, of generated images and of held-out ones.

    copies: the share of generated images that are at least as near as the nearest `quantile` of the held-out ones;
    about `quantile` for a model that has learnt the distribution, near 1 for one that repeats what it saw.
    nearer: how often a generated image is nearer than a held-out one, ties counted half; 0.5 by rights (the test of
    Meehan et al. 2020, arXiv:2004.05675, over all images at once).
    """

    suits_real = False
    numbers = {"copies": "lower", "nearer": "lower"}

    class Config(MetricConfig):
        name: Literal["memorisation"] = "memorisation"
        quantile: Annotated[float, Field(gt=0, lt=1)] = 0.05

    def lacks(self, samples: Seen, real: Real) -> str | None:
        if real.held_out is None:
            return "it needs pictures that the model was not trained on: held_out=..., or a run that held some out"
        return super().lacks(samples, real) or few(len(real.held_out), _LEAST_HELD_OUT)

    def measure(self, samples: Seen, real: Real) -> dict[str, float]:
        assert real.seen is not None and real.held_out is not None
        there, others = real.seen.features, real.held_out.features
        mine = nearest(samples.features, there, 1).distance[:, 0]
        theirs = real.once("memorisation", lambda: nearest(others, there, 1).distance[:, 0])
        return {
            "copies": (mine <= theirs.quantile(self.config.quantile)).float().mean().item(),
            "nearer": _how_often_less(mine, theirs),
        }


def _how_often_less(x: Tensor, y: Tensor) -> float:
    """P(x < y) + P(x = y) / 2 over all pairs of [N] and [M]."""
    ordered = y.sort().values
    below = torch.searchsorted(ordered, x)  # values of y less than x
    below_or_equal = torch.searchsorted(ordered, x, right=True)
    less = len(y) - (below + below_or_equal).double() / 2
    return (less.mean() / len(y)).item()
