"""What every objective is: draw the randomness of a step, then compute a loss from it without drawing more."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..core.registry import ComponentConfig
from ..core.rng import NEWEST, Draws, Versions
from ..models.backbones.base import BackboneConfig
from ..models.denoiser import Boundary, Denoiser, Kind, per_image
from ..sampling.guidance import Guided
from .noise import NoiseConfig, NoiseSchedule


@dataclass(frozen=True)
class Batch:
    """What a loss is computed from: some images of a step, and all that was drawn for them."""

    x0: Tensor  # clean images [B, C, H, W] in [-1, 1]
    noise: Tensor  # unit normal [B, C, H, W]
    labels: Tensor | None  # int64 [B]
    dropout_keys: Tensor  # int32 [B, 2]
    levels: dict[str, Tensor]  # [B] each: the noise level "sigma", and what else the objective draws or schedules
    augment_labels: Tensor | None = None  # [B, augment_dim], where images are augmented


class ObjectiveConfig(ComponentConfig):
    """The `objective` group."""

    kind: ClassVar = "objective"

    def needs_teacher(self) -> bool:
        """Whether the loss is given a teacher."""
        return False

    def without_files(self) -> Self:
        """The same loss but for what needs a file from outside: enough to tell what the rest of a step takes."""
        return self

    def check_machine(self) -> None:
        """Raise InputError where this machine lacks what the loss needs; asked before a teacher is trained."""

    def check_backbone(self, backbone: BackboneConfig) -> None:
        """Raise InputError where the network can't be told what the loss tells it."""

    def is_deterministic(self) -> bool:
        """Whether a GPU can compute the loss and its gradient to the same bits each time."""
        return True

    def relative_gap(self, noise: NoiseConfig) -> float:
        """How close the two noise levels that the loss compares ever come, relative to the larger; inf without two."""
        return math.inf


class Objective(nn.Module):
    """A loss with its networks.

    Args:
        config: the class's own `Config`.
        denoiser: the student, trained.
        noise: draws noise levels.
        seed: key of all randomness.
        hflip: flip half of the images horizontally.
        teacher: a frozen denoiser, where `config.needs_teacher()`.
        label_dropout: how often a label becomes the null label.
        versions: how random numbers are drawn, see `rng.NEWEST`.
    """

    kind: ClassVar[Kind]  # of model that it trains,
    boundary: ClassVar[Boundary]  # and where that is the identity
    levels: ClassVar[Literal["continuous", "grid"]]  # what it asks of the noise config

    def __init__(
        self,
        config: Any,
        denoiser: Denoiser,
        noise: NoiseSchedule,
        seed: int,
        hflip: bool = False,
        teacher: Denoiser | Guided | None = None,
        label_dropout: float = 0.0,
        versions: Versions = NEWEST,
    ):
        super().__init__()
        self._rows_version = versions["rows"]
        self.config, self.denoiser, self.noise, self.seed, self.hflip = config, denoiser, noise, seed, hflip
        self.teacher, self.label_dropout = teacher, label_dropout

    def draw(self, x0: Tensor, labels: Tensor | None, step: int, rows: range) -> Batch:
        """Every random tensor of `step` for `rows` of the global batch; `forward` draws nothing.

        What a loss takes from the step itself belongs here too, as a tensor: a number would recompile each step.

        Args:
            x0: images [B, C, H, W] in [-1, 1]; labels: int64 [B] or None.
            rows: the positions of these images in the global batch.
        """
        draws = self.draws(step, rows, x0.device)
        if self.hflip:
            x0 = torch.where(per_image(draws.bits("flip") < 0, x0), x0.flip(-1), x0)
        if labels is not None and self.label_dropout:
            dropped = draws.uniform("label_dropout") < self.label_dropout
            labels = torch.where(dropped, self.denoiser.config.num_classes, labels)
        return Batch(
            x0=x0,
            noise=draws.normal("noise", x0.shape[1:]),
            labels=labels,
            dropout_keys=draws.bits("dropout", (2,)),
            levels=self.draw_levels(draws.uniform("sigma"), step),
        )

    def draws(self, step: int, rows: range, device: torch.device) -> Draws:
        """The random numbers of `step` for `rows` of the global batch."""
        return Draws(self.seed, step, rows, device, self._rows_version)

    def draw_levels(self, u: Tensor, step: int) -> dict[str, Tensor]:
        """A batch's `levels` for uniforms u [B], float64."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each image [B], and named metrics of each image, float64 [B], which have no gradient."""
        loss, metrics = self.losses(batch)
        # Of another type than the loss, so that the two can't be one tensor. Torch's compiler drops a multiplication by
        # a weight of 1 (and a copy), returns loss and distance as one, and detaching the distance takes the gradient
        # from the loss: "element 0 of tensors does not require grad".
        return loss, {name: value.detach().double() for name, value in metrics.items()}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each image [B], with its gradient, and named metrics of each image [B]."""
        raise NotImplementedError

    def after_step(self, step: int, weights: Tensor, applied: Tensor) -> None:
        """Called after each optimizer step with the student's flat weights; `applied` is 0.0 where it was skipped."""

    def schedule(self, step: int) -> dict[str, float]:
        """The scheduled numbers of `step`, for the log."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors, beside the student's weights, that a resumed run needs; loaded in place by name."""
        return {}
