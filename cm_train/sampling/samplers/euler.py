"""Euler's method."""

from typing import Literal

from torch import Tensor

from ...core.registry import register
from ...models.denoiser import per_image
from .base import Denoise, SamplerConfig
from .ode import ODESampler, slope


def euler_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One first-order step of the probability-flow ODE from sigma [B] to sigma_next [B]; one call."""
    return x + per_image(sigma_next - sigma, x) * slope(denoise, x, sigma)


@register
class Euler(ODESampler):
    """First order: a call a level."""

    class Config(SamplerConfig):
        name: Literal["euler"] = "euler"

    order = 1
    calls_per_step = 1
    step = staticmethod(euler_step)
