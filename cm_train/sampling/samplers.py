"""Samplers and solver steps: pure functions of a denoiser, noisy images and noise levels.

A `denoise` argument is any callable (x [B, C, H, W], sigma [B]) -> denoised [B, C, H, W].
"""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from ..models.denoiser import per_image

Denoise = Callable[[Tensor, Tensor], Tensor]


def _slope(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma of the probability-flow ODE: (x - D(x, sigma)) / sigma, Karras et al. 2022, eq. 3."""
    return (x - denoise(x, sigma)) / per_image(sigma, x)


def euler_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One first-order step of the probability-flow ODE from sigma [B] to sigma_next [B]."""
    return x + per_image(sigma_next - sigma, x) * _slope(denoise, x, sigma)


def heun_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One second-order step of the probability-flow ODE from sigma [B] to sigma_next [B] > 0; two calls."""
    step = per_image(sigma_next - sigma, x)
    slope = _slope(denoise, x, sigma)
    return x + step * (slope + _slope(denoise, x + step * slope, sigma_next)) / 2


def _solve(stepper: Callable[..., Tensor], denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    levels = [x.new_full((x.shape[0],), sigma) for sigma in sigmas]
    for sigma, sigma_next in itertools.pairwise(levels):
        x = stepper(denoise, x, sigma, sigma_next)
    return denoise(x, levels[-1])  # the Euler step to 0


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """First-order solution from sigmas[0] down the grid and on to 0; NFE len(sigmas)."""
    return _solve(euler_step, denoise, x, sigmas)


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Karras et al. 2022, algorithm 1: second order, the last interval to 0 by Euler; NFE 2 len(sigmas) - 1."""
    return _solve(heun_step, denoise, x, sigmas)


def multistep(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], boundary: float, noise: Callable[[int], Tensor]
) -> Tensor:
    """Multistep consistency sampling, Song et al. 2023, algorithm 1; NFE len(sigmas); one level is one-step.

    Args:
        x: noise scaled to sigmas[0].
        sigmas: descending levels to denoise at, each above `boundary`.
        boundary: the noise level of what `denoise` returns: sigma_min, and 0 in TrigFlow.
        noise: unit noise for the re-noising before level i >= 1. It is scaled by sqrt(sigma^2 - boundary^2): a sample
            already carries the boundary's noise, so the variance comes out exact.
    """
    x = denoise(x, x.new_full((x.shape[0],), sigmas[0]))
    for i, sigma in enumerate(sigmas[1:], start=1):
        x = x + noise(i) * (sigma**2 - boundary**2) ** 0.5
        x = denoise(x, x.new_full((x.shape[0],), sigma))
    return x
