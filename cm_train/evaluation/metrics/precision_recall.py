"""Precision and recall: how many generated images look real, and how many kinds of real ones are generated."""

from typing import Annotated, Literal

from pydantic import Field

from ...core.registry import register
from ..seen import Seen
from .base import Metric, MetricConfig, Real, few, some_of

_AT_ONCE = 10_000  # rows and columns of a table of distances
_LARGE = 20_000  # images, from which on no table of all distances is held


@register
class PrecisionRecall(Metric):
    """Shares of one set that lie within the k-th neighbour's distance of an image of the other.

    Kynkäänniemi et al. 2019 (arXiv:1904.06991, eq. 1 and 2), by torch-fidelity.
    """

    numbers = {"precision": "higher", "recall": "higher"}
    unbiased = frozenset(["precision"])
    package = "torch-fidelity"

    class Config(MetricConfig):
        name: Literal["pr"] = "pr"
        neighbours: Annotated[int, Field(ge=1)] = 3
        num_real: Annotated[int, Field(ge=2)] = 10_000  # of the reference at most: all distances among them are needed

    def lacks(self, samples: Seen, real: Real) -> str | None:
        least = self.config.neighbours + 1
        return super().lacks(samples, real) or few(min(len(samples), len(real.seen or ())), least)

    def measure(self, samples: Seen, real: Real) -> dict[str, float]:
        from torch_fidelity.metric_prc import prc_features_to_metric

        assert real.seen is not None
        there = some_of(real.seen, self.config.num_real)
        found = prc_features_to_metric(
            samples.features,
            there.features,
            prc_neighborhood=self.config.neighbours,
            prc_batch_size=_AT_ONCE,
            save_cpu_ram=max(len(samples), len(there)) > _LARGE,
            verbose=False,
        )
        return {"precision": found["precision"], "recall": found["recall"]}
