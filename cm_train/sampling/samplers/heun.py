"""Heun's method."""

from typing import Literal

from torch import Tensor

from ...core.registry import register
from ...models.denoiser import per_image
from .base import Denoise, SamplerConfig
from .ode import ODESampler, slope


def heun_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One second-order step of the probability-flow ODE from sigma [B] to sigma_next [B] > 0; two calls."""
    step = per_image(sigma_next - sigma, x)
    first = slope(denoise, x, sigma)
    return x + step * (first + slope(denoise, x + step * first, sigma_next)) / 2


@register
class Heun(ODESampler):
    """Second order, Karras et al. 2022, algorithm 1: 2 n - 1 calls for n levels."""

    class Config(SamplerConfig):
        name: Literal["heun"] = "heun"

    usual_for = "diffusion"
    order = 2
    calls_per_step = 2
    step = staticmethod(heun_step)
