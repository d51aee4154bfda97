"""Distances between two batches of images, one number per image: as functions, and as what `objective.distance` names.

A distance is called with images [B, C, H, W] twice and returns [B].
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..core.registry import ComponentConfig, register


class DistanceConfig(ComponentConfig):
    """What a distance that is chosen by name needs to know, and what is known of it."""

    kind: ClassVar = "distance"
    is_deterministic: ClassVar[bool] = True  # whether a GPU computes its gradient to the same bits each time

    def check_machine(self) -> None:
        """Raise InputError where this machine lacks what the distance needs."""


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference over the pixels; [B, ...] twice -> [B]."""
    return (x - y).square().flatten(1).mean(1)


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference over the pixels; [B, ...] twice -> [B]."""
    return (x - y).abs().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor, c: float | None = None) -> Tensor:
    """sqrt(||x - y||^2 + c^2) - c with one norm over the whole image; [B, ...] twice -> [B].

    Song & Dhariwal 2023 (iCT), eq. 8. One root per *pixel* instead is a different loss that trains badly.

    Args:
        c: smoothing in pixel units; None takes the paper's 0.00054 sqrt(pixels * channels).
    """
    difference = (x - y).flatten(1)
    if c is None:
        c = 0.00054 * difference.shape[1] ** 0.5
    # The same value as sqrt(s + c^2) - c, without the cancellation where s << c^2.
    s = difference.square().sum(1)
    return s / (torch.sqrt(s + c * c) + c)


@register
class L1:
    """See `l1`."""

    class Config(DistanceConfig):
        name: Literal["l1"] = "l1"

    def __init__(self, config: Config):
        pass

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return l1(x, y)


@register
class L2:
    """See `l2`."""

    class Config(DistanceConfig):
        name: Literal["l2"] = "l2"

    def __init__(self, config: Config):
        pass

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return l2(x, y)


@register
class PseudoHuber:
    """See `pseudo_huber`."""

    class Config(DistanceConfig):
        name: Literal["pseudo_huber"] = "pseudo_huber"
        huber_c: Annotated[float, Field(gt=0)] | None = None

    def __init__(self, config: Config):
        self.c = config.huber_c

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return pseudo_huber(x, y, self.c)
