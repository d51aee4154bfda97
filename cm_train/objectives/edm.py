"""Denoising score matching: the diffusion teacher."""

from typing import Any, Literal

from torch import Tensor

from ..core.registry import register
from ..models.denoiser import Denoiser, per_image
from .base import Batch, Objective, ObjectiveConfig
from .distances import l2
from .weighting import LearnedWeighting


@register
class EDM(Objective):
    """Karras et al. 2022, eq. 8 and table 1: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 ||D(x; sigma) - x0||^2.

    The squared norm is a mean over the pixels. With `weighting=learned` that loss L becomes exp(-u(sigma)) L + u(sigma)
    for a learned u: Karras et al. 2024 (EDM2), eq. 21.
    """

    class Config(ObjectiveConfig):
        name: Literal["edm"] = "edm"
        weighting: Literal["fixed", "learned"] = "fixed"  # learned: each noise level is divided by its expected loss

    kind = "diffusion"
    boundary = "zero"
    levels = "continuous"

    def __init__(self, config: Any, denoiser: Denoiser, *args: Any, **kwargs: Any):
        super().__init__(config, denoiser, *args, **kwargs)
        self.weighting = LearnedWeighting(denoiser) if config.weighting == "learned" else None

    def draw_levels(self, u: Tensor, step: int) -> dict[str, Tensor]:
        return {"sigma": self.noise.sigma(u)}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, sigma = batch.x0, batch.levels["sigma"]
        x = x0 + per_image(sigma, x0) * batch.noise
        distance = l2(self.denoiser(x, sigma, batch.labels, batch.dropout_keys), x0)
        data = self.denoiser.config.sigma_data
        loss = (sigma**2 + data**2) / (sigma * data) ** 2 * distance
        return loss if self.weighting is None else self.weighting.weighted(loss, sigma), {"distance": distance}

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.weighting is None else dict(self.weighting.state_dict())
