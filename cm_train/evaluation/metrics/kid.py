"""KID, the kernel inception distance, on any features: unbiased, so that few images do."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.registry import register
from ..features.base import needs, version_of
from ..seen import Seen
from .base import Metric, MetricConfig, Real, few

_ROWS = 2048  # of a table of kernels, in one go


@register
class KID(Metric):
    """The squared maximum mean discrepancy of the kernel (x'y / D + 1)^3: Bińkowski et al. 2018 (arXiv:1801.01401).

    Where both sets have `subset_size` images it is torch-fidelity's: the mean over `subsets` of them. Where one has
    fewer all images are compared with all, by the unbiased estimator (eq. 4). It may be a little below 0.
    """

    numbers = {"kid": "lower"}

    class Config(MetricConfig):
        name: Literal["kid"] = "kid"
        subset_size: Annotated[int, Field(ge=2)] = 1000
        subsets: Annotated[int, Field(ge=1)] = 100

    def lacks(self, samples: Seen, real: Real) -> str | None:
        return super().lacks(samples, real) or few(len(samples), 2)

    def made_with(self) -> dict[str, str]:
        return version_of("torch-fidelity")

    def measure(self, samples: Seen, real: Real) -> dict[str, float]:
        assert real.seen is not None
        x, y = samples.features, real.seen.features
        if min(len(x), len(y)) < self.config.subset_size:
            return {"kid": mmd(x, y)}
        try:
            from torch_fidelity.metric_kid import kid_features_to_metric
        except ImportError:
            raise needs("torch-fidelity", f"kid of {self.config.subset_size} images or more") from None
        found = kid_features_to_metric(
            x.double(),
            y.double(),
            kid_subsets=self.config.subsets,
            kid_subset_size=self.config.subset_size,
            verbose=False,
        )
        return {"kid": found["kernel_inception_distance_mean"]}


def mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, of all pairs of features [N, D] and [M, D]; N and M at least 2."""
    x, y = x.double(), y.double()
    within = (_sum(x, x) - _kernel_with_itself(x)) / (len(x) * (len(x) - 1))
    within += (_sum(y, y) - _kernel_with_itself(y)) / (len(y) * (len(y) - 1))
    return within - 2 * _sum(x, y) / (len(x) * len(y))


def _sum(x: Tensor, y: Tensor) -> float:
    """Of the kernel over all pairs."""
    return sum((some @ y.T / x.shape[1] + 1).pow(3).sum().item() for some in x.split(_ROWS))


def _kernel_with_itself(x: Tensor) -> float:
    return (torch.linalg.vecdot(x, x) / x.shape[1] + 1).pow(3).sum().item()
