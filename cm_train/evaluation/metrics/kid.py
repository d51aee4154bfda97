"""KID, the kernel inception distance, on any features: unbiased, so that few images do."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.registry import register
from ...core.signals import heed
from ..seen import Seen
from .base import Metric, MetricConfig, Real, few, some_of

_VALUES = 2**23  # of a table of kernels, at once


@register
class KID(Metric):
    """The squared maximum mean discrepancy of the kernel (x'y / D + 1)^3: Bińkowski et al. 2018 (arXiv:1801.01401).

    Where both sets have `subset_size` images it is torch-fidelity's: the mean over `subsets` of them. Where one has
    fewer all images are compared with all, by the unbiased estimator (eq. 4). It may be a little below 0.
    """

    numbers = {"kid": "lower"}
    unbiased = frozenset(["kid"])
    package = "torch-fidelity"

    class Config(MetricConfig):
        name: Literal["kid"] = "kid"
        subset_size: Annotated[int, Field(ge=2)] = 1000
        subsets: Annotated[int, Field(ge=1)] = 100
        num_real: Annotated[int, Field(ge=2)] = 10_000  # of the reference at most, where all are compared with all

    def lacks(self, samples: Seen, real: Real) -> str | None:
        return super().lacks(samples, real) or few(min(len(samples), len(real.seen or ())), 2)

    def measure(self, samples: Seen, real: Real) -> dict[str, float]:
        assert real.seen is not None
        x, y = samples.features, real.seen.features
        if min(len(x), len(y)) < self.config.subset_size:
            some = some_of(real.seen, self.config.num_real).features
            within = real.once(("kid", self.config.num_real), lambda: _within(some))
            return {"kid": mmd(x, some, within)}
        from torch_fidelity.metric_kid import kid_features_to_metric

        found = kid_features_to_metric(
            x.double(),
            y.double(),
            kid_subsets=self.config.subsets,
            kid_subset_size=self.config.subset_size,
            verbose=False,
        )
        return {"kid": found["kernel_inception_distance_mean"]}


def mmd(x: Tensor, y: Tensor, within_y: float | None = None) -> float:
    """The unbiased estimate, of all pairs of features [N, D] and [M, D]; N and M at least 2.

    Args:
        within_y: the mean of the kernel over pairs of different rows of y, where it is known.
    """
    if within_y is None:
        within_y = _within(y)
    return _within(x) + within_y - 2 * _sum(x, y) / (len(x) * len(y))


def _within(x: Tensor) -> float:
    """The mean of the kernel over pairs of different rows."""
    x = x.double()
    itself = (torch.linalg.vecdot(x, x) / x.shape[1] + 1).pow(3).sum().item()
    return (_sum(x, x) - itself) / (len(x) * (len(x) - 1))


def _sum(x: Tensor, y: Tensor) -> float:
    """Of the kernel over all pairs."""
    total, y = 0.0, y.double()
    for some in x.split(max(1, _VALUES // len(y))):
        heed()
        total += (some.double() @ y.T / x.shape[1] + 1).pow(3).sum().item()
    return total
