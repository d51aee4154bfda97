"""What the networks compute in, and the loss scale that keeps fp16 gradients out of the underflow."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

# bf16 rounds to 2^-8. Outputs at two noise levels that lie less than some 8 times that apart differ by little more than
# the roundings, which then make up the better part of a distance between them.
_BF16_GAP = 2.0**-5
_FIRST_SCALE = 2.0**16
_GROWS_AFTER = 2000  # clean steps, as in torch.amp


def autocast_type(precision: str, device: torch.device, relative_gap: float = math.inf) -> torch.dtype | None:
    """The type that `precision` means on `device` for the networks' arithmetic; None for float32 throughout.

    Args:
        relative_gap: how close the two noise levels come that a loss compares; see `ObjectiveConfig.relative_gap`.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32"
        if has_bf16:
            precision = "fp16" if too_close_for_bf16(relative_gap) else "bf16"
    return {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@contextlib.contextmanager
def arithmetic(precision: str, deterministic: bool = False) -> Iterator[None]:
    """A context in which float32 on a GPU is float32, or TF32 where `precision` is "tf32".

    Left alone, cuDNN computes float32 convolutions in TF32, whose products have 10 bits.

    Args:
        deterministic: equal bits whenever the same is computed on the same GPU, at some cost in speed. Has to begin
            before the process first multiplies matrices on the GPU.
    """
    reproducible = _reproducible() if deterministic else contextlib.nullcontext()
    with _float32_as("tf32" if precision == "tf32" else "ieee"), reproducible:
        yield


@contextlib.contextmanager
def _float32_as(kind: Literal["ieee", "tf32"]) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    try:
        older = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # whoever uses torch's newer switches in this process can't read the older ones any more
        newer = [part.fp32_precision for part in (cudnn.conv, cudnn.rnn, matmul)]
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = matmul.fp32_precision = kind
        try:
            yield
        finally:
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision = newer
        return
    # Torch's compiler reads the older ones, and raises where the newer ones say something else.
    cudnn.allow_tf32 = kind == "tf32"
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield
    finally:
        cudnn.allow_tf32 = older[0]
        torch.set_float32_matmul_precision(older[1])


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    memory: Any = torch.utils.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may sum in another order each time
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # has the compiler choose no kernel by the time that it takes, too
    memory.fill_uninitialized_memory = False  # is for finding bugs, and costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def too_close_for_bf16(relative_gap: float) -> bool:
    """Whether what a loss compares at two noise levels, `relative_gap` apart, differs by less than bf16 can tell."""
    return relative_gap < _BF16_GAP


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
        """What `load` goes on from; nothing where the factor is always 1."""
        return {"factor": self.factor, "clean_steps": self.clean_steps} if self.active else {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`; one of another precision says nothing and is passed over."""
        if self.active and state:
            self.factor.copy_(state["factor"])
            self.clean_steps.copy_(state["clean_steps"])
