"""The Inception score: whether a classifier is sure of each image, and not always of the same class."""

from typing import Annotated, Literal

from pydantic import Field

from ...core.registry import register
from ..seen import Seen
from .base import Metric, MetricConfig, Real, few

_A_SPLIT = 500  # images that a part has at least: fewer make the score smaller


@register
class InceptionScore(Metric):
    """exp of the mean of KL(p(class | image) || p(class)): Salimans et al. 2016 (arXiv:1606.03498), by torch-fidelity.

    It is the mean over `splits` parts, or over fewer where those would have less than 500 images.
    """

    numbers = {"is": "higher"}
    package = "torch-fidelity"

    class Config(MetricConfig):
        name: Literal["is"] = "is"
        splits: Annotated[int, Field(ge=1)] = 10

    def lacks(self, samples: Seen, real: Real) -> str | None:
        if samples.logits is None:
            return f"features={real.features} knows no classes"
        lacks = super().lacks(samples, real) if real.given is None else None  # it never looks at the real ones
        return lacks or few(len(samples), 2)

    def measure(self, samples: Seen, real: Real) -> dict[str, float]:
        from torch_fidelity.metric_isc import isc_features_to_metric

        assert samples.logits is not None
        splits = max(1, min(self.config.splits, len(samples) // _A_SPLIT))
        return {"is": isc_features_to_metric(samples.logits, splits)["inception_score_mean"]}
