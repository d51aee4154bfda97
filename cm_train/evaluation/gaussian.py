"""Mean and covariance of features, by which Fréchet distances compare sets of images."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

_ROWS = 4096  # added up in one go


@dataclass(frozen=True)
class Gaussian:
    """What is known of the features of N images.

    Attributes:
        mean: float64 [D].
        cov: float64 [D, D], over N - 1.
        num: N, where it is known.
    """

    mean: Tensor
    cov: Tensor
    num: int | None

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features [N, D], N at least 2."""
        mean = features.double().mean(0)
        cov = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for some in features.split(_ROWS):
            centred = some.double() - mean
            cov += centred.T @ centred
        return cls(mean, cov / (len(features) - 1), len(features))

    @cached_property
    def root(self) -> Tensor:
        """A factor A of the covariance, A'A = cov; float64 [D, D]."""
        values, vectors = torch.linalg.eigh(self.cov)
        return values.clamp(min=0).sqrt()[:, None] * vectors.T
