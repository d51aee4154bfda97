"""What the networks compute in, and the loss scale that keeps fp16 gradients out of the underflow."""

import math

import torch
from torch import Tensor

# bf16 rounds to 2^-8. Outputs at two noise levels that lie less than some 8 times that apart differ by little more than
# the roundings, which then make up the better part of a distance between them.
_BF16_GAP = 2.0**-5
_FIRST_SCALE = 2.0**16
_GROWS_AFTER = 2000  # clean steps, as in torch.amp


def autocast_type(precision: str, device: torch.device, gap: float = math.inf) -> torch.dtype | None:
    """The type that `precision` (auto, fp32, bf16, fp16) means on `device`; None for float32 throughout.

    Args:
        gap: how close the two noise levels come that a loss compares, relative to the larger; see `Objective.gap`.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if not has_bf16 else "fp16" if drowns_in_bf16(gap) else "bf16"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def drowns_in_bf16(gap: float) -> bool:
    """Whether what a loss compares at two noise levels, `gap` apart, differs by less than bf16 can tell."""
    return gap < _BF16_GAP


def compiles(setting: str, device: torch.device) -> bool:
    """Whether `setting` (auto, true, false) compiles the objective on `device`."""
    return device.type == "cuda" if setting == "auto" else setting == "true"


class LossScale:
    """The factor on the loss: halved after an overflow, doubled after 2000 clean steps, 1 except in fp16.

    Lives on the device and is never read by the host, unlike torch.amp.GradScaler's.
    """

    def __init__(self, autocast: torch.dtype | None, device: torch.device):
        self.active = autocast == torch.float16
        self.factor = torch.full((), _FIRST_SCALE if self.active else 1.0, device=device)
        self.clean_steps = torch.zeros((), device=device)

    def update(self, applied: Tensor) -> None:
        """Take note of a step; `applied` is 1.0, or 0.0 where it was skipped."""
        if not self.active:
            return
        self.clean_steps.add_(1).mul_(applied)
        grow = self.clean_steps >= _GROWS_AFTER
        self.factor.mul_(torch.where(applied > 0, torch.where(grow, 2.0, 1.0), 0.5)).clamp_(min=1.0)
        self.clean_steps.mul_(~grow)

    def state(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "clean_steps": self.clean_steps} if self.active else {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`; one of another precision says nothing and is passed over."""
        if self.active and state:
            self.factor.copy_(state["factor"])
            self.clean_steps.copy_(state["clean_steps"])
