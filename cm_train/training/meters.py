"""Means of what the steps report, summed on the device and read once a log line."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.world import World


class Window:
    """Sums and counts by name since the last log line, of this rank's images.

    In float64: a stop adds the ranks' sums in another order, which must not show in the means.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name -> [sum, number of values]

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add values of any shape; one that is not finite is left out, since a skipped step is counted elsewhere."""
        for name, value in values.items():
            finite = torch.isfinite(value)
            pair = torch.stack([torch.where(finite, value, 0.0).double().sum(), finite.sum()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def close(self, world: World) -> dict[str, float | None]:
        """The means over all ranks, None where nothing was finite, and start anew. Waits for the device."""
        sums = world.sum_(torch.stack([*self._sums.values()])).tolist()
        names, self._sums = [*self._sums], {}
        return {name: total / count if count else None for name, (total, count) in zip(names, sums, strict=True)}

    def state(self, world: World) -> dict[str, Tensor]:
        """The sums over all ranks."""
        return {name: world.sum_(pair.clone()) for name, pair in self._sums.items()}

    def load(self, state: Mapping[str, Tensor], device: torch.device, world: World) -> None:
        """Go on from `state`; one rank does, for all."""
        self._sums = {name: pair.to(device) * world.is_main for name, pair in state.items()}
