"""Adam and RAdam on one flat vector, able to skip a step on the device without asking the host.

torch.optim can't do this for RAdam: its fused Adam skips on a device-side flag, RAdam does not, and reading the
flag would stop the host in every step. Values agree with torch.optim's (a test holds both against it).
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.registry import ComponentConfig, register
from ..core.settings import Positive

Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(ComponentConfig):
    """The `optimizer` group."""

    kind: ClassVar = "optimizer"

    lr: Positive
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    decay_after: Annotated[int, Field(ge=1)] = 10_000  # steps that inverse_sqrt leaves as they are
    clip_norm: Annotated[float, Field(gt=0)] | None = None


@register
class Adam:
    """Kingma & Ba 2015, algorithm 1, on a flat vector.

    Args:
        weights, gradient: float32 [P]; `gradient` is overwritten by a step.

    Attributes:
        moved: the direction [P] and the factor by which the last step has moved the weights; the direction may lie in
            the gradient's memory, and so holds until that is written again. None before the first step.
    """

    class Config(OptimizerConfig):
        name: Literal["adam"] = "adam"
        lr: Positive = 1e-3

    def __init__(self, config: OptimizerConfig, weights: Tensor, gradient: Tensor, schedule_steps: int):
        self.config, self.weights, self.gradient = config, weights, gradient
        self.schedule_steps = schedule_steps
        self.mean = torch.zeros_like(weights)
        self.square = torch.zeros_like(weights)
        # Counts applied steps only, so a skipped one leaves the bias corrections alone.
        self.count = torch.zeros((), dtype=torch.float64, device=weights.device)
        self.moved: tuple[Tensor, Tensor] | None = None

    def lr(self, step: int) -> float:
        """The learning rate of `step`, counted from 0: linear warm-up, then as `schedule` says.

        Constant; a cosine to zero at `schedule_steps`; or lr / sqrt(max(step / decay_after, 1)), as in
        Karras et al. 2024 (EDM2).
        """
        c = self.config
        warm = min(1.0, (step + 1) / (c.warmup_steps + 1))
        if c.schedule == "constant":
            return c.lr * warm
        if c.schedule == "inverse_sqrt":
            return c.lr * warm / math.sqrt(max(step / c.decay_after, 1))
        done = min(step, self.schedule_steps) / self.schedule_steps
        return c.lr * warm * 0.5 * (1 + math.cos(math.pi * done))

    @torch.no_grad()
    def step(self, step: int, grad_scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Apply `gradient * grad_scale`, clipped to `clip_norm`, unless it is not finite.

        Returns:
            The gradient's norm before clipping, and 1.0 where the step was applied, 0.0 where skipped; both
            0-dim on the device, never read here.
        """
        norm = torch.linalg.vector_norm(self.gradient) * grad_scale
        applied = torch.isfinite(norm).to(self.gradient.dtype)
        scale = torch.as_tensor(grad_scale, device=norm.device) * applied
        if self.config.clip_norm is not None:
            scale = scale * (self.config.clip_norm / (norm + 1e-6)).nan_to_num(0.0).clamp(max=1.0)
        self.gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(scale.nan_to_num(0.0))  # 0 * NaN would be NaN

        beta1, beta2 = self.config.betas
        self.count += applied
        self.mean.lerp_(self.gradient, applied * (1 - beta1))
        self.square.mul_(1 - applied * (1 - beta2)).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        count = self.count.clamp(min=1)  # it is 0 only where the very first step is skipped and nothing moves
        update, size = self._update(count, beta1, beta2)
        self.moved = update, -self.lr(step) * applied * size
        self.weights.addcmul_(*self.moved)
        return norm, applied

    def _update(self, t: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
        """The direction [P] (may reuse the gradient's memory) and its device-side factor, at applied step t >= 1."""
        root = torch.sqrt(1 - beta2**t)
        denominator = torch.sqrt(self.square, out=self.gradient).div_(root.float()).add_(self.config.eps)
        return torch.div(self.mean, denominator, out=self.gradient), (1 / (1 - beta1**t)).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Both moments, float32 [P] each, and the number of applied steps; not copied."""
        return {"mean": self.mean, "square": self.square, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, in place."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])


@register
class RAdam(Adam):
    """Liu et al. 2020, algorithm 2: Adam whose adaptive part waits until its variance is tractable."""

    class Config(OptimizerConfig):
        name: Literal["radam"] = "radam"
        lr: Positive = 4e-4

    def _update(self, t: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        rectifier = torch.sqrt(
            ((rho - 4) * (rho - 2) * rho_inf).clamp(min=0) / ((rho_inf - 4) * (rho_inf - 2) * rho.clamp(min=1e-3))
        )
        adaptive = rho > 5
        # Below the threshold the direction is the plain mean: divide by 1 (0 * sqrt(square) + 1).
        factor = torch.where(adaptive, rectifier * torch.sqrt(1 - beta2**t), torch.ones_like(t))
        offset = torch.where(adaptive, self.config.eps, 1.0)
        denominator = torch.sqrt(self.square, out=self.gradient).mul_(adaptive.float()).add_(offset.float())
        return torch.div(self.mean, denominator, out=self.gradient), (factor / (1 - beta1**t)).float()
