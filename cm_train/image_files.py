"""Image files as users have them: listed in a folder or a zip from anywhere, read with bounds, decoded to uint8."""

import errno
import io
import os
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .errors import InputError
from .files import may_pass, patiently
from .tracking import progress

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
# Nothing else is tried: Pillow also knows formats that start other programs (EPS) or that nobody has tested much.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_MAX_BYTES = 2**28  # a file
_MAX_PIXELS = 89_478_485  # an image: where Pillow starts to warn of decompression bombs; a third of a GiB in memory
_LARGE_PIXELS = 2**24  # an image above which only one is decoded at a time, whatever the number of threads
_MAX_VISITS = 64  # of one real folder, by links: a few that point at each other can stand for millions
_SAMPLED_BYTES = 2**14  # of a file, at its beginning, middle and end, to tell it from others of its name and size
_large = threading.Lock()


class ImageFiles(Protocol):
    """Where images come from.

    Attributes:
        identities: for each relative path (with /) what is known of its content without reading it.
        stamps: for each what changes when it is written to, where `identities` does not tell contents apart.
    """

    identities: dict[str, str]
    stamps: dict[str, str]

    def read(self, name: str) -> bytes:
        """The whole file. Raises OSError, or ValueError where it is none that may be read."""

    def sample(self, name: str) -> bytes:
        """A few bytes that tell it from most other files of its size; none where its identity does. Raises OSError."""

    def close(self) -> None: ...


def open_files(root: str) -> ImageFiles:
    """The image files of a folder or a .zip, read in place. Raises InputError where there is neither."""
    path = Path(os.path.expanduser(root))  # os.path's functions take any text: no such user, a name too long
    if os.path.isdir(path):
        return _Folder(path)
    if os.path.isfile(path):
        return _Zip(path)
    raise InputError("no such data", str(path), "a folder of images, or a .zip of them", "set dataset.root=...")


def _wanted(parts: list[str]) -> bool:
    """Whether a path is an image that a person put there: nothing hidden, and nothing that only macOS needs."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


class _Folder:
    def __init__(self, root: Path):
        self.root = root
        try:
            with progress(None, "listing images") as bar:
                self.identities: dict[str, str] = {}
                self.stamps: dict[str, str] = {}
                for name, found in self._scan():
                    self.identities[name] = str(None if found is None else found.st_size)
                    self.stamps[name] = "" if found is None else _stamp(found)
                    bar.advance()
        except OSError as error:
            raise InputError("can't list a folder of images", str(error)) from error

    def _scan(self) -> Iterator[tuple[str, os.stat_result | None]]:
        """All images; symbolic links are followed, but not round in circles. A link to nothing is a broken image."""
        todo: list[tuple[list[str], frozenset[str]]] = [([], frozenset())]
        visits: Counter[str] = Counter()
        while todo:
            parts, above = todo.pop()
            folder = os.path.join(self.root, *parts)
            real = os.path.realpath(folder)
            if real in above:
                continue
            visits[real] += 1
            if visits[real] > _MAX_VISITS:
                raise InputError(f"links lead to {real} more than {_MAX_VISITS} times", fix="remove some of them")
            for entry in patiently(lambda: _entries(folder)):  # noqa: B023 - called at once
                path, found = [*parts, entry.name], _stat(entry.path)
                if found is not None and stat.S_ISDIR(found.st_mode):
                    todo.append((path, above | {real}))
                elif _wanted(path):
                    yield "/".join(path), found if found is not None and stat.S_ISREG(found.st_mode) else None

    def read(self, name: str) -> bytes:
        path = self.root / name
        with open(path, "rb", opener=_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise ValueError(f"{size} bytes are more than {_MAX_BYTES}")
            return file.read(_MAX_BYTES)

    def sample(self, name: str) -> bytes:
        try:
            with open(self.root / name, "rb", buffering=0, opener=_regular) as file:
                size = os.fstat(file.fileno()).st_size
                starts = {0, max(0, size // 2 - _SAMPLED_BYTES // 2), max(0, size - _SAMPLED_BYTES)}
                return b"".join(os.pread(file.fileno(), _SAMPLED_BYTES, start) for start in sorted(starts))
        except (ValueError, OSError) as error:
            if may_pass(error):
                raise
            return b""  # broken, and no more than its identity is known of it

    def close(self) -> None:
        pass


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _stat(path: str) -> os.stat_result | None:
    """None for a link to nothing, or to itself. Raises other OSErrors."""
    try:
        return patiently(lambda: os.stat(path))
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP:
            return None
        raise


def _stamp(found: os.stat_result) -> str:
    """What no two files share, and what changes when one is written to."""
    return f"{found.st_dev} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"


def _regular(path: str, flags: int) -> int:
    """For `open`: a pipe would block for ever."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("not a regular file")
    return handle


class _Zip:
    """Members are read one at a time into memory; nothing is ever unpacked to disk."""

    def __init__(self, root: Path):
        self._lock = threading.Lock()  # a ZipFile counts its open members without one
        try:
            self._zip = zipfile.ZipFile(root)
            self._members = dict(self._scan())
            if sum(info.compress_size for info in self._members.values()) > root.stat().st_size:
                raise ValueError("its members overlap")  # so that a small file inflates for ever
        except Exception as error:  # a file that only looks like a zip raises nearly anything
            raise InputError("not a zip of images", f"{root}: {error}", "a folder, or a .zip") from error
        self.identities = {name: f"{info.file_size} {info.CRC}" for name, info in self._members.items()}
        self.stamps: dict[str, str] = {}

    def _scan(self) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        for info in self._zip.infolist():
            parts = [part for part in info.filename.replace("\\", "/").split("/") if part not in ("", ".")]
            if parts and not info.is_dir() and _wanted(parts):
                yield "/".join(parts), info

    def read(self, name: str) -> bytes:
        info = self._members[name]
        if info.file_size > _MAX_BYTES:
            raise ValueError(f"{info.file_size} bytes are more than {_MAX_BYTES}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # zipfile can bound what these two become in memory; the others can fill it.
            raise ValueError("compressed in another way than zip's usual one")
        with self._lock, self._zip.open(info) as member:
            return member.read(info.file_size)  # asked for no size, it inflates up to a GiB, whatever was declared

    def sample(self, name: str) -> bytes:
        return b""

    def close(self) -> None:
        self._zip.close()


def decode(data: bytes, image_size: int, channels: int, background: int) -> Tensor:
    """One image file as uint8 [channels, image_size, image_size]: upright, opaque, 8 bits, never distorted.

    Args:
        data: the bytes of the file.
        background: grey level, 0..255, that shows through transparency.

    Raises:
        Exception: whatever Pillow raises for a file that is broken, or ValueError for one that is too large.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f in Image.OPEN]) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are more than {_MAX_PIXELS}")
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


def _flatten(image, channels: int, background: int):
    """A Pillow image of any mode in mode L or RGB."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits; Pillow itself would clip them to 8
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("grey levels outside of 16 bits")
        image = Image.fromarray(((deep.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating point grey levels have no known range")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def reason(error: Exception) -> str:
    """What `decode` or `read` raised, in words."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its own message shows a Python object
        return "not an image, or a damaged one"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
