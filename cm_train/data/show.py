"""Images as a notebook shows them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import InputError
from .pixels import grid, to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image


def show(
    images: Tensor, columns: int | None = None, captions: Sequence[str] | None = None, min_side: int = 640
) -> "Image":
    """One picture of all images, which Jupyter displays where it is a cell's last line; `.save("x.png")` keeps it.

    Args:
        images: uint8, or float in [-1, 1] (what is beyond is cut off), [N, C, H, W] or [C, H, W], C 1 or 3.
        columns: None makes the grid about square.
        captions: what to write under each image, cut where it is too long.
        min_side: small images are enlarged by a whole factor until the picture's longer side is about this, in pixels.

    Raises:
        InputError: these are no images, or not as many captions.
    """
    from PIL import Image

    allowed = "uint8, or float in [-1, 1], [N, 1 or 3, H, W]"
    if not isinstance(images, Tensor):
        raise InputError("images are a tensor", type(images).__name__, allowed)
    each = images.detach() if images.ndim == 4 else images.detach()[None]
    if each.ndim != 4 or each.shape[1] not in (1, 3) or not each.numel():
        raise InputError("these are no images", f"shape {list(images.shape)}", allowed)
    if each.dtype != torch.uint8 and not each.is_floating_point():
        raise InputError("these are no images", f"{each.dtype}", allowed)
    if captions and len(captions) != len(each):
        raise InputError("captions are one an image", f"{len(captions)} for {len(each)} images")
    if columns is not None and columns < 1:
        raise InputError("columns must be positive", columns, "1, 2, 3, ...")
    pixels = each if each.dtype == torch.uint8 else to_uint8(each.float())
    array = grid(pixels.cpu(), columns, min_side, captions).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
