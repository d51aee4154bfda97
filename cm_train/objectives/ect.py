"""Easy consistency tuning: a consistency loss whose two noise levels draw together as training goes on."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.registry import register
from ..core.settings import Positive
from ..models.denoiser import per_image
from .base import Batch, Objective, ObjectiveConfig
from .distances import pseudo_huber
from .noise import NoiseConfig

_TINY = 1e-16  # in c's place where it is 0: the root's slope is infinite at 0


class ECTConfig(ObjectiveConfig):
    """The `objective` group for `name: ect`."""

    name: Literal["ect"] = "ect"
    q: Annotated[float, Field(gt=1, le=1e6)] = 2.0  # how much closer the levels come from one stage to the next
    k: Positive = 8.0  # how much further apart they are at low noise,
    b: Positive = 1.0  # and how fast that fades
    num_stages: Annotated[int, Field(ge=1, le=32)] = 8  # of equal length; stage s has a gap of about sigma / q^(s + 1)
    huber_c: Annotated[float, Field(ge=0)] = 0.0  # 0: the plain norm
    # 1 / (sigma - sigma_next), or the ImageNet recipe's 1 / sigma^2 + 1 / sigma_data^2
    weighting: Literal["inverse_gap", "snr_plus_one"] = "inverse_gap"

    def relative_gap(self, noise: NoiseConfig) -> float:
        return self.q**-self.num_stages  # of the last stage, far above b


@register
class ECT(Objective):
    """w(sigma) d(f(x, sigma), stopgrad f(x_next, sigma_next)): Geng et al. 2024 (Consistency Models Made Easy).

    Both points share image, noise and dropout mask. Where sigma_next is 0 the goal is the image itself, which makes
    the first stage a diffusion loss at low noise; hence the good start from a diffusion model's weights. That goal
    demands the identity at 0, so the coefficients are EDM's; their CIFAR-10 code moves that point to 0.003 for sampling
    only.
    """

    Config = ECTConfig
    kind = "consistency"
    boundary = "zero"
    levels = "continuous"

    def stage(self, step: int) -> int:
        """The stage of `step`, 0 to num_stages - 1."""
        return min(step * self.config.num_stages // self.noise.schedule_steps, self.config.num_stages - 1)

    def sigma_next(self, sigma: Tensor, step: int) -> Tensor:
        """r(t) = max(0, t (1 - (1 + k sigmoid(-b t)) / q^(s + 1))), Geng et al. 2024, section 3.3; [B] -> [B]."""
        c = self.config
        return (sigma * (1 - (1 + c.k * torch.sigmoid(-c.b * sigma)) / c.q ** (self.stage(step) + 1))).clamp(min=0)

    def draw_levels(self, u: Tensor, step: int) -> dict[str, Tensor]:
        sigma = self.noise.sigma(u)
        return {"sigma": sigma, "sigma_next": self.sigma_next(sigma, step)}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, noise, labels, keys = batch.x0, batch.noise, batch.labels, batch.dropout_keys
        sigma, sigma_next = batch.levels["sigma"], batch.levels["sigma_next"]
        denoised = self.denoiser(x0 + per_image(sigma, x0) * noise, sigma, labels, keys)
        with torch.no_grad():
            x_next = x0 + per_image(sigma_next, x0) * noise
            clean = sigma_next == 0  # of which the network could only say NaN: its input is a logarithm
            goal = self.denoiser(x_next, torch.where(clean, sigma, sigma_next), labels, keys)
            goal = torch.where(per_image(clean, x0), x0, goal)
        distance = pseudo_huber(denoised, goal, max(self.config.huber_c, _TINY))
        return self._weight(sigma, sigma_next) * distance, {"distance": distance}

    def _weight(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        if self.config.weighting == "inverse_gap":
            return 1 / (sigma - sigma_next)
        return 1 / sigma**2 + 1 / self.denoiser.config.sigma_data**2

    def schedule(self, step: int) -> dict[str, float]:
        return {"stage": self.stage(step)}
