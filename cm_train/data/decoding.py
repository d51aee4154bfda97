"""One image file's bytes as uint8 pixels: upright, opaque, 8 bits, cut square and never distorted."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

# Nothing else is tried: Pillow also knows formats that start other programs (EPS) or that nobody has tested much.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
MAX_MEGAPIXELS = 89.478485  # an image: where Pillow starts to warn of decompression bombs; a third of a GiB in memory
_LARGE_PIXELS = 2**24  # an image above which only one is decoded at a time, whatever the number of threads
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF
_large = threading.Lock()
_remarks = threading.local()


def prepare() -> None:
    """Call this before threads decode: loading Pillow's formats is not made for threads, nor are Python's warnings."""
    from PIL import Image

    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit can't be raised for one file; `decode` has another
    warnings.filterwarnings("always", module=r"PIL\.")
    otherwise = warnings.showwarning
    if getattr(otherwise, "keeps_remarks", False):
        return

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        kept = getattr(_remarks, "kept", None)
        if kept is None:
            otherwise(message, *args, **kwargs)
        else:
            kept.append(str(message))

    show.keeps_remarks = True  # type: ignore[attr-defined]
    warnings.showwarning = show


@contextmanager
def remarks() -> Iterator[list[str]]:
    """What Pillow warns of in this thread meanwhile, which by itself would not name the file."""
    _remarks.kept = []
    try:
        yield _remarks.kept
    finally:
        _remarks.kept = None


def decode(
    data: bytes, image_size: int, channels: int, background: int, max_megapixels: float = MAX_MEGAPIXELS
) -> Tensor:
    """One image file as uint8 [channels, image_size, image_size]: upright, opaque, 8 bits, never distorted.

    Args:
        data: the bytes of the file.
        background: grey level, 0..255, that shows through transparency.
        max_megapixels: of the file's image; a larger one may be meant to fill the memory.

    Raises:
        Exception: whatever Pillow raises for a file that is broken, or ValueError for one that is too large.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
        if image.width * image.height > max_megapixels * 1e6:
            size = f"{image.width}x{image.height} pixels are more than {max_megapixels:.4g} million"
            raise ValueError(f"{size} (dataset.max_megapixels)")
        image.draft(None, (2 * image_size, 2 * image_size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
        with _large if image.width * image.height > _LARGE_PIXELS else nullcontext():
            image.load()
            with suppress(Exception):  # damaged EXIF data says nothing about the pixels
                ImageOps.exif_transpose(image, in_place=True)
            flat = _flatten(image, channels, background)
    side = min(flat.size)
    left, top = (flat.width - side) // 2, (flat.height - side) // 2  # whole pixels: a crop alone must not blur
    box = (left, top, left + side, top + side)
    square = flat.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(square)).view(image_size, image_size, channels).permute(2, 0, 1)


def _flatten(image: Any, channels: int, background: int) -> Any:
    """A Pillow image of any mode in mode L or RGB."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating point grey levels have no known range")
    if image.mode.startswith("I"):
        image = _of_16_bits(image)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def _of_16_bits(image: Any) -> Any:
    """A grey image of 16 bits in mode L, or LA where it has a transparent level; Pillow itself would clip it to 8."""
    import numpy as np
    from PIL import Image

    deep = np.asarray(image).astype(np.int32)
    if deep.min() < 0 or deep.max() > 65535:
        raise ValueError("grey levels outside of 16 bits")
    clear = image.info.get("transparency")
    alpha = None if not isinstance(clear, int) else np.where(deep == clear, 0, 255).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow heeds in 8 bits alone
        deep = 65535 - deep
    levels = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    return levels if alpha is None else Image.merge("LA", (levels, Image.fromarray(alpha)))


def reason(error: Exception) -> str:
    """What `decode` or `read` raised, in words."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its own message shows a Python object
        return "not an image, or a damaged one"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
