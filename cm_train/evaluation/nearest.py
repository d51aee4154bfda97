"""Which images of a set are nearest to others, by their features."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.signals import heed

_VALUES = 2**24  # distances held at once


class Nearest(NamedTuple):
    """distance: Euclidean, ascending, float32 [N, k]; rows: which those are, int64 [N, k]."""

    distance: Tensor
    rows: Tensor


def distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Euclidean distances between all features [N, D] and [M, D], some rows of the table at a time.

    Yields:
        The number of the first row, and the rows; float32 [n, M].
    """
    each, y = max(1, _VALUES // len(y)), y.double()
    for start in range(0, len(x), each):
        heed()
        # By a product, in float64: in float32 what is nearly the same would be lost in the rounding.
        yield start, torch.cdist(x[start : start + each].double(), y, compute_mode="use_mm_for_euclid_dist").float()


def nearest(x: Tensor, y: Tensor, k: int) -> Nearest:
    """The k nearest of y [M, D] to each of x [N, D], k at most M."""
    found = [rows.topk(k, largest=False) for _, rows in distances(x, y)]
    return Nearest(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))
