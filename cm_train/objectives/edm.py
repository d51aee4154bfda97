"""Denoising score matching: the diffusion teacher."""

from typing import Literal

from torch import Tensor

from ..core.registry import register
from ..models.denoiser import per_image
from .base import Batch, Objective, ObjectiveConfig
from .distances import l2


@register
class EDM(Objective):
    """Karras et al. 2022, eq. 8 and table 1: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 ||D(x; sigma) - x0||^2.

    The squared norm is a mean over the pixels.
    """

    class Config(ObjectiveConfig):
        name: Literal["edm"] = "edm"

    kind = "diffusion"
    boundary = "zero"
    levels = "continuous"

    def draw_levels(self, u: Tensor, step: int) -> dict[str, Tensor]:
        return {"sigma": self.noise.sigma(u)}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, sigma = batch.x0, batch.levels["sigma"]
        x = x0 + per_image(sigma, x0) * batch.noise
        distance = l2(self.denoiser(x, sigma, batch.labels, batch.dropout_keys), x0)
        data = self.denoiser.config.sigma_data
        return (sigma**2 + data**2) / (sigma * data) ** 2 * distance, {"distance": distance}
