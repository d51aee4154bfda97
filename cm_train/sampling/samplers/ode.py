"""Samplers that solve the probability-flow ODE, which a diffusion model's denoiser defines."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from ...models.denoiser import DenoiserConfig, per_image
from ...models.noise_levels import karras_sigmas
from .base import Denoise, Sampler


def slope(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma of the probability-flow ODE at sigma [B]: (x - D(x, sigma)) / sigma, Karras et al. 2022, eq. 3."""
    return (x - denoise(x, sigma)) / per_image(sigma, x)


class ODESampler(Sampler):
    """Goes down the noise levels by `step`, and on to 0 by Euler's, of which the denoiser's output is the end.

    Attributes:
        calls_per_step: network calls of one `step`.
    """

    calls_per_step: ClassVar[int]

    @staticmethod
    @abstractmethod
    def step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """x [B, C, H, W] at noise level sigma [B], taken to sigma_next [B], which is lower and not 0."""

    def num_calls(self, num_levels: int) -> int:
        return self.calls_per_step * (num_levels - 1) + 1

    def levels(self, config: DenoiserConfig, steps: int | None) -> list[float]:
        """The grid of Karras et al. 2022, of as many points as the checkpoint says where `steps` is None."""
        num = config.sampling.num_scales if steps is None else steps
        return karras_sigmas(max(num, 2), config.sigma_min, config.sigma_max, config.rho).tolist()[:num]

    def sample(
        self, denoise: Denoise, x: Tensor, sigmas: Sequence[float], boundary: float, noise: Callable[[int], Tensor]
    ) -> Tensor:
        levels = [x.new_full((x.shape[0],), sigma) for sigma in sigmas]
        for sigma, sigma_next in itertools.pairwise(levels):
            x = self.step(denoise, x, sigma, sigma_next)
        return denoise(x, levels[-1])
