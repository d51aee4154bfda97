"""What several networks compute alike, as fast as we know how, and what all of them refuse."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import forward_ad

from ...core.errors import InputError
from .base import at_least_float32

Count = Annotated[int, Field(ge=1, le=1024)]  # bounded, since a stranger's checkpoint says what to build
Resampling = Literal["", "down", "up"]


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32 at least, whatever the autocast type."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            inputs = at_least_float32(x)
            if forward_ad.unpack_dual(x).tangent is not None:
                inputs = inputs.contiguous()  # torch 2.11 takes the forward-mode derivative of this layout alone
            return super().forward(inputs).to(x.dtype)
        # The compiler takes the operator apart just so, but knows no forward-mode derivative of the whole, which sCM
        # needs.
        groups = at_least_float32(x).reshape(x.shape[0], self.num_groups, -1)
        variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
        normal = ((groups - mean) * torch.rsqrt(variance + self.eps)).reshape(x.shape)
        return torch.addcmul(self.bias[:, None, None], normal, self.weight[:, None, None]).to(x.dtype)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention over the pixels, scaled by the root of a head's channels; [B, 3 C, H, W] -> [B, C, H, W].

    Args:
        qkv: channels ordered (q|k|v, head, channel): in channels_last a head's channels then lie side by side, as
            the fused kernels want them, and nothing is copied.
    """
    b, c, h, w = qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:]
    q, k, v = qkv.reshape(b, 3, heads, c // heads, h * w).transpose(-1, -2).unbind(1)  # [B, heads, pixels, channels]
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)


def resample(x: Tensor, direction: str) -> Tensor:
    """x [B, C, H, W] at half its side by 2 x 2 means ("down"), at twice by repeating each pixel ("up"), or as it is."""
    if not direction:
        return x
    return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


def num_heads(channels: int, head_channels: int, count: int | None = None) -> int:
    """How many attention heads `channels` make, or `count` of them. Raises InputError where they don't divide."""
    if count is not None:
        if channels % count:
            raise InputError(
                "attention heads must divide the width",
                f"{channels} channels in {count} heads",
                fix="set backbone.num_heads to a divisor of every width with attention",
            )
        return count
    if channels % head_channels:
        raise InputError(
            "attention heads must divide the width",
            f"{channels} channels in heads of {head_channels}",
            fix="set backbone.head_channels to a divisor",
        )
    return channels // head_channels


def check_halves(image_size: int, levels: int) -> None:
    """Refuse images that a network of so many levels can't halve. Raises InputError."""
    if image_size % 2 ** (levels - 1):
        raise InputError(
            f"{levels} levels halve the image {levels - 1} times",
            f"image size {image_size}",
            f"a multiple of {2 ** (levels - 1)}",
            "set backbone.channel_mult to fewer levels, or dataset.image_size",
        )


def check_labels(labels: Tensor | None, num_classes: int) -> None:
    """Refuse labels for a network without classes, and none for one with classes. Raises InputError."""
    if (labels is None) == bool(num_classes):
        raise InputError(
            "labels go with a class-conditional network and with no other",
            "no labels" if labels is None else "labels",
            f"{num_classes} classes",
        )
