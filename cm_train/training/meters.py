"""Means of what the steps report, summed on the device and read once a log line; norms of long vectors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.world import World

NUM_BANDS = 8
_PART = 2**21
# Where the loss comes from: noise levels from sigma_min (band 0) to sigma_max, in bands of one width in ln sigma.
_BANDS = tuple(f"loss_band_{i}" for i in range(NUM_BANDS))


class Window:
    """Sums and counts by name since the last log line, of this rank's images.

    In float64: a stop adds the ranks' sums in another order, which must not show in the means.

    Args:
        sigma_min, sigma_max: what the bands of noise lie between; levels beyond count for the band at that end.
    """

    def __init__(self, device: torch.device, sigma_min: float, sigma_max: float) -> None:
        ends = [math.log(sigma_min) + math.log(sigma_max / sigma_min) * i / NUM_BANDS for i in range(1, NUM_BANDS)]
        self._device, self._edges = device, torch.tensor(ends, device=device).exp()
        # What is added together has one tensor: a step costs few kernels. Names -> [names, 2]: sum, number of values.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._stored: dict[str, Tensor] = {}  # of a checkpoint, until the same names are added again

    def add(self, values: Mapping[str, Tensor], sigma: Tensor | None = None) -> None:
        """Add values of any shape; one that is not finite is left out, since a skipped step is counted elsewhere.

        Args:
            sigma: the noise levels [B] of the "loss" [B] among the values.
        """
        for shape in dict.fromkeys(value.shape for value in values.values()):
            alike = {name: value.reshape(-1) for name, value in values.items() if value.shape == shape}
            found = torch.stack([value.double() for value in alike.values()])
            finite = found - found == 0
            pairs = torch.stack([torch.where(finite, found, 0.0), finite.double()], dim=-1)  # [names, values, 2]
            self._of(tuple(alike)).add_(pairs.sum(1))
            if sigma is not None and "loss" in alike:
                band = torch.bucketize(sigma, self._edges.to(sigma.dtype))
                self._of(_BANDS).index_add_(0, band, pairs[list(alike).index("loss")])

    def close(self, world: World) -> dict[str, float | None]:
        """The means over all ranks, None where nothing was finite, and start anew. Waits for the device.

        A band of noise without an image is left out.
        """
        names, sums = self._summed(world)
        self._sums, self._stored = {}, {}
        pairs = zip(names, sums.tolist(), strict=True)
        return {name: total / count if count else None for name, (total, count) in pairs if count or name not in _BANDS}

    def state(self, world: World) -> dict[str, Tensor]:
        """The sums over all ranks."""
        return dict(zip(*self._summed(world), strict=True))

    def load(self, state: Mapping[str, Tensor], world: World) -> None:
        """Go on from `state`; one rank does, for all. Raises TypeError where it holds anything else."""
        if any(pair.shape != (2,) or pair.dtype != torch.float64 for pair in state.values()):
            raise TypeError("what was logged are pairs of a sum and a number")
        self._sums = {}
        self._stored = {name: pair.to(self._device) * world.is_main for name, pair in state.items()}

    def _of(self, names: tuple[str, ...]) -> Tensor:
        """The sums [names, 2] of what is added together."""
        if names not in self._sums:
            nothing = torch.zeros(2, dtype=torch.float64, device=self._device)
            self._sums[names] = torch.stack([self._stored.pop(name, nothing) for name in names])
        return self._sums[names]

    def _summed(self, world: World) -> tuple[list[str], Tensor]:
        """All names and their sums [names, 2] over the ranks, which have the same names in the same order."""
        names = [*(name for group in self._sums for name in group), *self._stored]
        parts = [*self._sums.values(), *(pair[None] for pair in self._stored.values())]
        if not parts:
            return [], torch.zeros(0, 2, dtype=torch.float64)
        return names, world.sum_(torch.cat(parts))


def norm(flat: Tensor) -> Tensor:
    """The norm of a long vector [P], 0-dim; by parts, since a CPU is off by 0.5 % for 60 million in one go."""
    parts = [torch.linalg.vector_norm(part) for part in flat.split(_PART)]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return whole
