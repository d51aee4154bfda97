"""A diffusion teacher whose loss minds outliers less: the pseudo-Huber distance in the place of the squared one."""

from typing import Literal

from torch import Tensor

from cm_train.core.registry import register
from cm_train.core.settings import Positive
from cm_train.models.denoiser import per_image
from cm_train.objectives.base import Batch, Objective, ObjectiveConfig
from cm_train.objectives.distances import pseudo_huber


@register
class RobustEDM(Objective):
    """EDM's weights on ||D(x; sigma) - x0|| as a pseudo-Huber distance."""

    class Config(ObjectiveConfig):
        name: Literal["robust_edm"] = "robust_edm"
        huber_c: Positive = 0.03  # what is smaller counts as its square

    kind = "diffusion"
    boundary = "zero"
    levels = "continuous"

    def draw_levels(self, u: Tensor, step: int) -> dict[str, Tensor]:
        return {"sigma": self.noise.sigma(u)}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, sigma, data = batch.x0, batch.levels["sigma"], self.denoiser.config.sigma_data
        x = x0 + per_image(sigma, x0) * batch.noise
        denoised = self.denoiser(x, sigma, batch.labels, batch.dropout_keys)
        distance = pseudo_huber(denoised, x0, self.config.huber_c)
        return (sigma**2 + data**2).sqrt() / (sigma * data) * distance, {"distance": distance}
