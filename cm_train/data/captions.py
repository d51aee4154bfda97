"""Words under pictures, by the font that Pillow brings."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NARROWEST = 64  # pixels that a caption needs to say anything
_INK = 235
_SMALLEST, _LARGEST = 11, 28  # sizes of the font
_DOTS = "…"


def written(captions: Sequence[str], width: int, grey: int) -> Tensor:
    """A strip for each caption, one line on `grey`; uint8 [N, 1, height, `width`].

    Where Pillow has been built without fonts the strips are empty: a height of 0.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    size = min(max(width // 6, _SMALLEST), _LARGEST)
    try:
        font = ImageFont.load_default(size)
    except ImportError:
        return torch.empty(len(captions), 1, 0, width, dtype=torch.uint8)
    height = round(1.4 * size)
    made: dict[str, Tensor] = {}
    for caption in dict.fromkeys(captions):
        strip = Image.new("L", (width, height), grey)
        text = _cut(caption, width, font.getlength)
        ImageDraw.Draw(strip).text((width / 2, height / 2), text, _INK, font, anchor="mm")
        made[caption] = torch.from_numpy(np.array(strip))[None]
    return torch.stack([made[caption] for caption in captions])


def _cut(text: str, width: int, length_of: Callable[[str], float]) -> str:
    """As much of it as there is room for, with dots for the rest."""
    if length_of(text) <= width:
        return text
    while text and length_of(text + _DOTS) > width:
        text = text[:-1].rstrip()
    return text + _DOTS
