"""What the networks compute in, and the loss scale that keeps fp16 gradients out of the underflow."""

import torch
from torch import Tensor

_FIRST_SCALE = 2.0**16
_GROWS_AFTER = 2000  # clean steps, as in torch.amp


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that `precision` (auto, fp32, bf16, fp16) means on `device`; None for float32 throughout."""
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


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
