"""Distances between two batches of images, one number per image."""

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


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
