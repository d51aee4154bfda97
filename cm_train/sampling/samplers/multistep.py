"""Multistep consistency sampling."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from ...core.errors import InputError
from ...core.registry import register
from ...models.denoiser import DenoiserConfig, Kind
from ...models.noise_levels import karras_sigmas
from .base import Denoise, Sampler, SamplerConfig


@register
class Multistep(Sampler):
    """Denoise, add noise up to the next level, denoise again: Song et al. 2023, algorithm 1; a call a level.

    The noise is scaled by sqrt(sigma^2 - boundary^2): a sample already carries the boundary's, so that the variance
    comes out exact.
    """

    class Config(SamplerConfig):
        name: Literal["multistep"] = "multistep"

    usual_for: ClassVar[Kind | None] = "consistency"

    def num_calls(self, num_levels: int) -> int:
        return num_levels

    def levels(self, config: DenoiserConfig, steps: int | None) -> list[float]:
        """The checkpoint's own points for so many steps, one where that is None, or what is spread over its grid."""
        steps = 1 if steps is None else steps
        own = config.sampling.points.get(steps)
        return _spread(config, steps) if own is None else own

    def sample(
        self, denoise: Denoise, x: Tensor, sigmas: Sequence[float], boundary: float, noise: Callable[[int], Tensor]
    ) -> Tensor:
        x = denoise(x, x.new_full((x.shape[0],), sigmas[0]))
        for i, sigma in enumerate(sigmas[1:], start=1):
            x = x + noise(i) * (sigma**2 - boundary**2) ** 0.5
            x = denoise(x, x.new_full((x.shape[0],), sigma))
        return x


def _spread(config: DenoiserConfig, steps: int) -> list[float]:
    """Evenly spaced indices of the checkpoint's grid, from sigma_max down, without sigma_min."""
    num = config.sampling.num_scales
    if steps > num - 1:
        raise InputError("more steps than the checkpoint's grid has", steps, f"1 to {num - 1}", "give sigmas=[...]")
    grid = karras_sigmas(num, config.sigma_min, config.sigma_max, config.rho).tolist()
    return [grid[round(i * (num - 1) / steps)] for i in range(steps)]
