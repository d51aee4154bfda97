"""Denoising score matching: the diffusion teacher."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from ..core.errors import InputError
from ..core.registry import register
from ..data.augmentation import NUM_LABELS, drawn
from ..models.backbones.base import BackboneConfig
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
        # How often each transform of `data.augmentation` happens to an image, which the network is told of; 0: none.
        augment: Annotated[float, Field(ge=0, le=1)] = 0.0

        def check_backbone(self, backbone: BackboneConfig) -> None:
            """Raises InputError for augmentation of which the network isn't told."""
            if self.augment and backbone.num_augment_labels != NUM_LABELS:
                raise InputError(
                    f"objective.augment={self.augment} needs a network that is told of it by {NUM_LABELS} numbers",
                    f"backbone.name={backbone.name} with {backbone.num_augment_labels}",
                    f"a songunet with backbone.augment_dim={NUM_LABELS}",
                    f"backbone=ddpmpp_cifar10 backbone.augment_dim={NUM_LABELS}, or objective.augment=0",
                )

    kind = "diffusion"
    boundary = "zero"
    levels = "continuous"

    def __init__(self, config: Any, denoiser: Denoiser, *args: Any, **kwargs: Any):
        super().__init__(config, denoiser, *args, **kwargs)
        self.weighting = LearnedWeighting(denoiser) if config.weighting == "learned" else None

    def draw(self, x0: Tensor, labels: Tensor | None, step: int, rows: range) -> Batch:
        """See `Objective`; with augmentation, that too."""
        batch = super().draw(x0, labels, step, rows)
        if not self.config.augment:
            return batch
        change = drawn(self.draws(step, rows, x0.device), self.config.augment)
        return dataclasses.replace(batch, x0=change.applied(batch.x0), augment_labels=change.labels())

    def draw_levels(self, u: Tensor, step: int) -> dict[str, Tensor]:
        return {"sigma": self.noise.sigma(u)}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, sigma = batch.x0, batch.levels["sigma"]
        x = x0 + per_image(sigma, x0) * batch.noise
        told = () if batch.augment_labels is None else (batch.augment_labels,)
        distance = l2(self.denoiser(x, sigma, batch.labels, batch.dropout_keys, *told), x0)
        data = self.denoiser.config.sigma_data
        loss = (sigma**2 + data**2) / (sigma * data) ** 2 * distance
        return loss if self.weighting is None else self.weighting.weighted(loss, sigma), {"distance": distance}

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.weighting is None else dict(self.weighting.state_dict())
