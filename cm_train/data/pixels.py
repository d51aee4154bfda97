"""Between tensors in [-1, 1] and pictures on disk; the one rounding rule of the whole project."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..core.files import not_through_a_link
from .captions import NARROWEST, written
from .png_notes import KEYWORD

_GAP_GREY = 90  # neither the black nor the white that images end in
_MOST_OVERHEAD = 1 << 16  # of a PNG, in bytes


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [..., H, W] -> float32 in [-1, 1]: 0 -> -1, 255 -> 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] (clamped) -> uint8 by rounding; the inverse of `to_unit_range` on its values."""
    return (images.clamp(-1, 1) * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8)


def grid(
    images: Tensor, columns: int | None = None, min_side: int = 640, captions: Sequence[str] | None = None
) -> Tensor:
    """One picture of uint8 images [N, C, H, W], N at least 1, with gaps between them; uint8 [C, H', W'].

    Args:
        columns: None makes the grid about square.
        min_side: small images are enlarged by a whole factor until the picture's longer side is about this.
        captions: what to write under each image, cut where it is too long; small images are enlarged more where that
            takes it. None, or empty: no captions.
    """
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows, gap = math.ceil(count / columns), max(1, height // 16)
    factor = max(1, round(min_side / max(rows * (height + gap) + gap, columns * (width + gap) + gap)))
    if captions:
        factor = max(factor, math.ceil(NARROWEST / width))
    cells, gap = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3), factor * gap
    if captions:
        strips = written(captions, width * factor, _GAP_GREY).to(cells.device)  # [N, 1, height of a line, W]
        cells = torch.cat([cells, strips.expand(-1, cells.shape[1], -1, -1)], 2)
    _, channels, height, width = cells.shape
    picture = cells.new_full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), _GAP_GREY)
    for i, cell in enumerate(cells):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        picture[:, y : y + height, x : x + width] = cell
    return picture


def save_png(picture: Tensor, path: str | os.PathLike[str], note: str = "") -> None:
    """Write one uint8 picture [C, H, W], C 1 or 3, as PNG.

    Args:
        note: what it is to say of itself, see `png_notes`; of Latin-1's characters.
    """
    from PIL import Image, PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    if note:
        texts.add_text(KEYWORD, note)
    array = picture.permute(1, 2, 0).contiguous().cpu().numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb", opener=not_through_a_link) as file:
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG", pnginfo=texts)


def read_png(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> Tensor | None:
    """The picture [C, H, W] that `save_png` wrote; None where there is none of that shape, or only half of one."""
    try:
        with open(path, "rb", opener=not_through_a_link) as file:
            if os.fstat(file.fileno()).st_size > 2 * math.prod(shape) + _MOST_OVERHEAD:
                return None
            return decoded_png(file, shape)
    except (OSError, ValueError):
        return None


def decoded_png(file: IO[bytes], shape: tuple[int, int, int]) -> Tensor | None:
    """As `read_png`, of what an open file holds."""
    import numpy as np
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(file, formats=["PNG"]) as image:
            if (image.mode, image.size) != ("L" if channels == 1 else "RGB", (width, height)):
                return None
            array = np.array(image)
    except Exception:  # Pillow raises nearly anything
        return None
    return torch.from_numpy(array).view(height, width, channels).permute(2, 0, 1)
