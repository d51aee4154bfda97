"""Averages of weights: the flat parameter vector, frozen copies of a network, and decay schedules.

Two different averages use this file and are never exchanged: the *target* of a consistency loss and the *ema*
that samples.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.registry import ComponentConfig, register

M = TypeVar("M", bound=nn.Module)
MAX_WIDTH = 0.28  # of a power-function average relative to the run: a flat one has 1 / sqrt(12)
Width = Annotated[float, Field(gt=0.001, lt=MAX_WIDTH)]
Decay = Annotated[float, Field(ge=0, lt=1)]
HalfLife = Annotated[float, Field(gt=0, le=1e12)]  # in images; beyond, rounding would make a decay 1


def flatten_parameters(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Move `parameters` into one vector and make each parameter a view of it; float32 [P].

    Optimizer, EMA and target are then one operation each instead of one per tensor, and a weight that lives on
    the device can scale them. Convolution kernels keep the channels_last layout inside the vector.
    """
    parameters = list(parameters)
    flat = torch.empty(sum(p.numel() for p in parameters), device=parameters[0].device)
    offset = 0
    for p in parameters:
        view = _view(flat[offset : offset + p.numel()], p)
        p.data = view.copy_(p.detach())
        offset += p.numel()
    return flat


def flatten_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """One zeroed vector that the gradients of `parameters` accumulate into, in their order."""
    parameters = list(parameters)
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    offset = 0
    for p in parameters:
        p.grad = _view(flat[offset : offset + p.numel()], p)
        offset += p.numel()
    return flat


def flat_size(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers `parameters` hold together."""
    return sum(p.numel() for p in parameters)


def _view(chunk: Tensor, like: Tensor) -> Tensor:
    if like.ndim != 4:
        return chunk.view(like.shape)
    out, inp, height, width = like.shape
    return chunk.view(out, height, width, inp).permute(0, 3, 1, 2)


def frozen_copy(module: M) -> tuple[M, Tensor]:
    """A deep copy without gradients in evaluation mode, and its flat parameter vector.

    Buffers are constants here and stay shared.
    """
    twin = copy.deepcopy(module, {id(b): b for b in module.buffers()}).requires_grad_(False).eval()
    return twin, flatten_parameters(twin.parameters())


@torch.no_grad()
def ema_update(average: Tensor, flat: Tensor, decay: float, applied: Tensor | None = None) -> None:
    """average <- decay average + (1 - decay) flat, in place.

    Args:
        applied: 0-dim float on the device, 0.0 where the step was skipped and nothing may move; None means 1.
    """
    average.lerp_(flat, 1 - decay if applied is None else applied * (1 - decay))


def power_exponent(width: float) -> float:
    """gamma of the profile t^gamma whose standard deviation is `width` of the time so far; 0 < width < 1 / sqrt(12).

    Karras et al. 2024 (EDM2), eq. 126: the largest real root of gamma^3 + 7 gamma^2 + (16 - width^-2) gamma
    + 12 - width^-2.
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real[np.abs(roots.imag) < 1e-9].max())


def power_decay(width: float, step: int) -> float:
    """(1 - 1 / t)^(gamma + 1) for t = step + 1 (EDM2, eq. 127): the first step, 0, forgets the start."""
    return (1 - 1 / (step + 1)) ** (power_exponent(width) + 1)


class EMAConfig(ComponentConfig):
    """The `ema` group."""

    kind: ClassVar = "decay"

    decay: Decay | None = 0.9999  # None: by the half-life, until the batch size is known
    half_life_images: HalfLife | None = None  # the past weighs half after as many
    extra: list[Decay] = []
    power: list[Width] = []  # relative widths of power-function averages kept beside (EDM2)
    num_snapshots: Annotated[int, Field(ge=1, le=10_000)] = 40  # of these, over the schedule

    def model_post_init(self, _: Any) -> None:
        if (self.decay is None) == (self.half_life_images is None):
            what, got = "ema.decay and ema.half_life_images say one thing", f"{self.decay}, {self.half_life_images}"
            fix = "set one of them" if self.decay is None else "leave one out, or set it to null"
            raise InputError(what, got, "a number for one, null for the other", fix)

    def with_decay(self, batch_size: int) -> Self:
        """The same with its half-life as the decay that it is for so many images a step.

        To three digits of what that lacks to 1, since averages carry their decay in their names.
        """
        if self.half_life_images is None:
            return self
        decay = 1 - float(f"{1 - 0.5 ** (batch_size / self.half_life_images):.3g}")
        return self.model_copy(update={"decay": decay, "half_life_images": None})

    @property
    def decays(self) -> list[float]:
        """The decays of the averages, after any warm-up; the one that `weights=ema` means comes first."""
        assert self.decay is not None, "`with_decay` has been called"
        return list(dict.fromkeys([self.decay, *self.extra]))


class DecaySchedule(ABC):
    """How the decay of an average comes to be what its config says."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def at(self, decay: float, step: int) -> float:
        """The decay to use in `step` (counted from 0) for an average whose final decay is `decay`."""


@register
class ConstantDecay(DecaySchedule):
    """The same decay at every step."""

    class Config(EMAConfig):
        name: Literal["constant"] = "constant"

    config: Config

    def at(self, decay: float, step: int) -> float:
        return decay


@register
class WarmupDecay(DecaySchedule):
    """min(decay, (1 + step) / (10 + step)): short runs forget their random start."""

    class Config(EMAConfig):
        name: Literal["warmup"] = "warmup"

    config: Config

    def at(self, decay: float, step: int) -> float:
        return min(decay, (1 + step) / (10 + step))


@register
class HalfLifeDecay(DecaySchedule):
    """0.5^(1 / H) with H = min(the half-life of decay, rampup * step) steps: Karras et al. 2022 (EDM), appendix F.

    A half-life of h images at batch size B is decay = 0.5^(B / h): EDM's 500,000 at 512 are 0.99929.
    """

    class Config(EMAConfig):
        name: Literal["half_life"] = "half_life"
        rampup: Annotated[float, Field(gt=0)] = 0.05  # of the steps so far that the half-life may span

    config: Config

    def at(self, decay: float, step: int) -> float:
        # 0.5^(1 / H) grows with H, so the shorter half-life is the smaller decay.
        return min(decay, 0.5 ** (1 / (self.config.rampup * step))) if step else 0.0
