"""A look at what image files say of themselves: their sizes and modes, without decoding any."""

import io
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..core.progress import progress
from ..core.signals import heed
from .decoding import FORMATS, prepare, remarks
from .image_files import ImageFiles

MOST_LOOKED_AT = 2000  # files, evenly among them all: enough for a median and for what is common
_HEAD_BYTES = 1 << 16  # in which most files say how large they are
_THREADS = 8
_SIDES = (16, 32, 64)  # that networks halve well


@dataclass(frozen=True)
class Survey:
    """What a look at some files has shown.

    Attributes:
        num: how many were looked at.
        sides: width and height of those that could be read, in pixels.
        modes: how many there are of each of Pillow's modes, as "RGBA".
        unreadable: the names of the others.
    """

    num: int
    sides: list[tuple[int, int]]
    modes: Counter[str]
    unreadable: list[str]

    def image_size(self, largest: int) -> int:
        """The largest of 16, 32 and 64, up to `largest`, that enlarges no more than half of the images."""
        short = self._median_short() if self.sides else largest
        return max((size for size in _SIDES if size <= min(short, largest)), default=_SIDES[0])

    def choice_of(self, size: int, largest: int) -> str:
        """Why `image_size` says so, in words."""
        why = "none of the pictures says how large it is"
        if self.sides:
            why = f"the pictures' median short side is {self._median_short():.0f}"
            if self._median_short() > largest:
                why += f", and more than {largest} has to be asked for here"
        return f"image_size={size}: {why}"

    def enlarged(self, size: int) -> float:
        """The share of pictures whose short side is less than `size`."""
        return sum(min(side) < size for side in self.sides) / max(1, len(self.sides))

    def _median_short(self) -> float:
        return statistics.median(min(side) for side in self.sides)


def survey(files: ImageFiles, names: list[str]) -> Survey:
    """Look at the heads of `names`, of as many as MOST_LOOKED_AT. Raises Stopped, see `signals.heed`."""
    prepare()
    some = [names[i * len(names) // MOST_LOOKED_AT] for i in range(MOST_LOOKED_AT)]
    some = names if len(names) <= MOST_LOOKED_AT else some

    def look(name: str) -> tuple[tuple[int, int], str] | None:
        heed()
        with remarks():
            return _head(files, name)

    with ThreadPoolExecutor(_THREADS) as pool, progress(len(some), "looking at images") as bar:
        found = []
        for head in pool.map(look, some):
            found.append(head)
            bar.advance()
    read = [head for head in found if head is not None]
    unreadable = [name for name, head in zip(some, found, strict=True) if head is None]
    return Survey(len(some), [size for size, _ in read], Counter(mode for _, mode in read), unreadable)


def _head(files: ImageFiles, name: str) -> tuple[tuple[int, int], str] | None:
    """Size and mode of an image; None where it does not say them, which whoever decodes it finds again."""
    from PIL import Image

    for whole in (False, True):  # a photograph's own preview, or a TIFF's table, may come before or after what counts
        try:
            data = files.read(name) if whole else files.sample(name, lambda size: [slice(0, min(size, _HEAD_BYTES))])
            with Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                return image.size, image.mode
        except Exception:
            continue
    return None
