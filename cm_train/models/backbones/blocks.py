"""What several networks are made of, and what all of them check."""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...core.errors import InputError

Count = Annotated[int, Field(ge=1, le=1024)]  # bounded, since a stranger's checkpoint says what to build
Resampling = Literal["", "down", "up"]


def resample(x: Tensor, direction: str) -> Tensor:
    """x [B, C, H, W] at half its side by 2 x 2 means, or at twice by nearest neighbours; "" leaves it as it is."""
    if not direction:
        return x
    return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


def num_heads(channels: int, head_channels: int) -> int:
    """How many attention heads so many channels are. Raises InputError where they don't divide."""
    if channels % head_channels:
        raise InputError(
            "attention heads must divide the width",
            f"{channels} channels in heads of {head_channels}",
            fix="set backbone.head_channels to a divisor",
        )
    return channels // head_channels


def check_levels(levels: int, image_size: int) -> None:
    """Refuse images that can't be halved between so many levels. Raises InputError."""
    if image_size % 2 ** (levels - 1):
        raise InputError(
            f"{levels} levels halve the image {levels - 1} times",
            f"image size {image_size}",
            f"a multiple of {2 ** (levels - 1)}",
            "set backbone.channel_mult to fewer levels, or dataset.image_size",
        )


def check_labels(labels: Tensor | None, num_classes: int) -> None:
    """Refuse labels for a network without classes, and none for one with them. Raises InputError."""
    if (labels is None) != (num_classes == 0):
        raise InputError(
            "labels go with a class-conditional network and with no other",
            "no labels" if labels is None else "labels",
            f"{num_classes} classes",
        )
