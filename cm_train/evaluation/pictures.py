"""The pictures beside a result: the first images, and those that are nearest to real ones with their neighbours."""

import os
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..data.pixels import grid, save_png
from .comparison import Comparison
from .neighbours import with_nearest
from .seen import Seen

_WITH_NEAREST = 8  # images that are shown with their neighbours
# Names of files, and what is to be said of them.
_IMAGES, _NEAREST = "images.png", "nearest.png"
_WORDS = {
    _IMAGES: "The first images",
    _NEAREST: "Those of them that are nearest to real images, and under each its nearest real ones",
}


def write_pictures(folder: Path, images: Tensor, seen: Seen, comparison: Comparison) -> None:
    """Write them. Raises OSError.

    Args:
        images: the first ones that were measured, uint8 [N, C, H, W].
        seen: of all of these, in their order.
    """
    _save(grid(images), folder / _IMAGES)
    if comparison.images is not None and comparison.real.seen is not None:
        num = min(_WITH_NEAREST, len(images))
        _save(with_nearest(images, seen, comparison.real.seen, comparison.images, num), folder / _NEAREST)


def read_pictures(folder: Path) -> dict[str, bytes]:
    """Those that are there, as PNG, by what is to be said of them."""
    found = {}
    for name, words in _WORDS.items():
        with suppress(OSError):
            found[words] = (folder / name).read_bytes()
    return found


def _save(picture: Tensor, path: Path) -> None:
    beside = path.with_name(f".{path.name}.writing")
    save_png(picture, beside)
    os.replace(beside, path)
