"""Image files as users have them, in a folder or a zip from anywhere: what is looked for, and within which bounds."""

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable

# What Pillow reads without starting other programs.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".webp", ".avif"),
    *(".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# What a person would call a picture too, and is not read: counted, so that nobody misses it in silence.
_UNREAD = (
    *(".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".jxr", ".tga", ".dds", ".pcx", ".ico"),
    *(".svg", ".eps", ".psd", ".xcf", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
LABELS = "dataset.json"  # where StyleGAN's and EDM's tools keep the labels of a folder or zip that they made
_MAX_BYTES = 2**28  # a file
_END_BYTES = 2**12

Places = Callable[[int], list[slice]]  # which bytes are looked at, of a file of that size, and within it


class ImageFiles(ABC):
    """Where images come from.

    Attributes:
        sizes: for each relative path (with /) its bytes, unpacked; None where it leads to no file.
        stamps: for each what changes when it, or the archive that it is in, is written to.
        unread: the relative paths of pictures that are not read, for each of their endings.
        label_files: the relative paths of all files that are called LABELS.
        doubled: how many more there are than names, as a zip may have; the last one of a name counts.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int | None] = {}
        self.stamps: dict[str, str] = {}
        self.unread: dict[str, list[str]] = defaultdict(list)
        self.label_files: list[str] = []
        self.doubled = 0

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file. Raises OSError, or another Exception where it is none that may be read."""

    @abstractmethod
    def sample(self, name: str, places: Places) -> bytes:
        """Its bytes at `places`, none where it is no file that may be read. Raises OSError where that may pass."""

    @abstractmethod
    def former(self, name: str) -> tuple[str, int | None, int | None]:
        """What earlier versions knew without reading it: its name as they saw it, its size, a zip's checksum of it."""

    def close(self) -> None:  # noqa: B027 - a folder holds nothing open
        """Read no more."""

    def _is_image(self, parts: list[str]) -> bool:
        """Whether a path is an image that a person put there: nothing hidden, and nothing that only macOS needs."""
        if any(map(is_hidden, parts)):
            return False
        name, ending = "/".join(parts), os.path.splitext(parts[-1])[1].lower()
        if ending in _UNREAD:
            self.unread[ending].append(name)
        if parts[-1].lower() == LABELS:
            self.label_files.append(name)
        return ending in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether people don't see a file or folder of this name."""
    return name.startswith(".") or name == "__MACOSX"


def check_size(size: int) -> None:
    """Raises ValueError for a file of more bytes than may be read."""
    if size > _MAX_BYTES:
        raise ValueError(f"{size} bytes are more than {_MAX_BYTES}")


def ends(size: int) -> list[slice]:
    """The first and last 4 KiB; nothing of a file that is too large to be read."""
    return [] if size > _MAX_BYTES else [slice(0, min(size, _END_BYTES)), slice(max(0, size - _END_BYTES), size)]


def stamp(found: os.stat_result) -> str:
    """What no two files share, and what changes when one is written to."""
    return f"{found.st_dev} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"
