"""Images as users have them: a folder or a zip, nested, of mixed formats, modes and sizes, from anywhere."""

import hashlib
import io
import os
import stat
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from ..registry import Settings, register
from .base import Dataset, InMemory

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
# Nothing else is tried: Pillow also knows formats that start other programs (EPS) or that nobody has tested much.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_MAX_BYTES = 2**28  # a file
_MAX_PIXELS = 89_478_485  # an image: where Pillow starts to warn of decompression bombs; a quarter of a GiB in RGB
_MAX_BAD_IN_A_ROW = 100
_CHUNK = 32  # images a thread decodes in one go
_PROGRESS_FROM = 2000  # images that take long enough to show a bar


@register("dataset", "image_folder")
class ImageFolder(Dataset):
    """Every image below `root`, scaled by its short side and cropped to the central square.

    Raises:
        InputError: no such folder or zip, no images in it, no class folders where labels are wanted, or an image
            that can't be decoded.
    """

    class Config(Settings):
        root: str  # a folder or a .zip, which is read in place
        image_size: Annotated[int, Field(ge=1, le=4096)] = 64
        channels: Literal[1, 3] = 3
        conditional: bool = False  # labels are the names of the first-level folders, sorted
        hflip: bool = True
        background: Annotated[int, Field(ge=0, le=255)] = 255  # grey level behind transparency; white, as on a page
        skip_broken: bool = False  # leave out what can't be decoded, with a warning
        memory_gb: Annotated[float, Field(ge=0)] = 4.0  # larger sets (decoded, in 1e9 bytes) are decoded on the fly

    def __init__(self, config: Config):
        from PIL import Image

        Image.init()  # here, since loading Pillow's plugins is not made for threads
        self.config = config
        self.image_size, self.channels, self.hflip = config.image_size, config.channels, config.hflip
        self._files = _open(config.root)
        self._names = sorted(self._files.identities)
        if not self._names:
            raise InputError("no images found", config.root, f"files that end in {' '.join(SUFFIXES)}")
        self.class_names: list[str] = []
        self._labels: Tensor | None = None
        if config.conditional:
            self.class_names, self._labels = _label(self._names, config.root)
        self._broken: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
        self.lazy = len(self._names) * self.channels * self.image_size**2 > config.memory_gb * 1e9
        self._held = None if self.lazy else self._decode_all()

    def __len__(self) -> int:
        return len(self._names) if self._held is None else len(self._held)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._held is not None:
            return self._held.gather(index)
        found = list(self._pool.map(self._decode_near, index.tolist()))
        images = self._host(torch.stack([image for _, image in found]))
        return images, None if self._labels is None else self._host(self._labels[[where for where, _ in found]])

    def to(self, device: torch.device | str) -> "ImageFolder":
        super().to(device)
        if self._held is not None:
            self._held.to(device)
        return self

    def fingerprint(self) -> str:
        """A sha256 in hex: of pixels and labels where they are in memory, else of names, sizes and settings."""
        if self._held is not None:
            return self._held.fingerprint()
        c = self.config
        digest = hashlib.sha256(repr((c.image_size, c.channels, c.conditional, c.background, c.skip_broken)).encode())
        for name in self._names:
            digest.update(repr((name, self._files.identities[name])).encode())
        return digest.hexdigest()

    def _decode_all(self) -> InMemory:
        images = torch.empty(len(self._names), self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        whole = torch.zeros(len(self._names), dtype=torch.bool)

        def fill(chunk: range) -> None:
            for i in chunk:
                image = self._decode(i)
                if image is not None:
                    images[i], whole[i] = image, True

        starts = range(0, len(self._names), _CHUNK)
        chunks = [range(start, min(start + _CHUNK, len(self._names))) for start in starts]
        with self._pool:
            for _ in _with_bar(self._pool.map(fill, chunks), len(chunks), len(self._names)):
                pass
        self._files.close()
        labels = self._labels
        if self._broken:
            if not whole.any():
                raise InputError("none of the images can be decoded", self._example(), fix="look at dataset.root")
            warnings.warn(
                f"left out {len(self._broken)} of {len(self._names)} images, e.g. {self._example()}", stacklevel=3
            )
            images, labels = images[whole], None if labels is None else labels[whole]
        return InMemory(images, labels, self.class_names, self.hflip)

    def _decode_near(self, i: int) -> tuple[int, Tensor]:
        """Image i and its index, or the next one that is whole: a broken file found late must not move the others."""
        for j in range(i, i + _MAX_BAD_IN_A_ROW):
            where = j % len(self._names)
            known = self._names[where] in self._broken
            image = None if known else self._decode(where)
            if image is not None:
                return where, image
            if not known:
                warnings.warn(f"another image stands in for {self._names[where]!r}, which is broken", stacklevel=2)
        raise InputError(f"{_MAX_BAD_IN_A_ROW} images in a row can't be decoded", self._example())

    def _decode(self, i: int) -> Tensor | None:
        """Image i, uint8 [C, S, S]; None where it is broken and may be skipped."""
        name, c = self._names[i], self.config
        try:
            return decode(self._files.read(name), c.image_size, c.channels, c.background)
        except Exception as error:  # a bad file makes Pillow raise nearly anything
            self._broken[name] = _reason(error)
            if c.skip_broken:
                return None
            raise InputError(
                f"image {name!r} in {c.root} can't be decoded",
                self._broken[name],
                fix="repair or remove it, or leave out all such files with dataset.skip_broken=true",
            ) from error

    def _example(self) -> str:
        name, reason = min(self._broken.copy().items())  # a copy, since other threads may add to it
        return f"{name!r} ({reason})"


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


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its own message shows a Python object
        return "not an image, or a damaged one"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _with_bar(done: Iterable[None], total: int, num_images: int) -> Iterable[None]:
    if num_images <= _PROGRESS_FROM or not sys.stderr.isatty():
        return done
    from rich.console import Console
    from rich.progress import track

    return track(done, "decoding images", total, console=Console(stderr=True), transient=True)


def _label(names: list[str], root: str) -> tuple[list[str], Tensor]:
    """Class names and a label for each file, by the first folders that divide the files."""
    paths = [name.split("/") for name in names]
    depth = 0
    while len({path[depth] for path in paths}) == 1 and all(len(path) > depth + 1 for path in paths):
        depth += 1
    stray = [name for name, path in zip(names, paths, strict=True) if len(path) < depth + 2]
    if stray:
        raise InputError(
            "dataset.conditional=true needs every image in a folder of its class",
            f"{len(stray)} of {len(names)} images outside of any, e.g. {stray[0]!r} in {root}",
            "two folders or more, one a class",
        )
    classes = sorted({path[depth] for path in paths})
    number = {name: i for i, name in enumerate(classes)}
    return classes, torch.tensor([number[path[depth]] for path in paths])


class _Files(Protocol):
    """Where images come from; `identities` maps a relative path (with /) to what tells one content from another."""

    identities: dict[str, str]

    def read(self, name: str) -> bytes: ...

    def close(self) -> None: ...


def _open(root: str) -> _Files:
    path = Path(root).expanduser()
    if path.is_dir():
        return _Folder(path)
    if path.is_file():
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
            self.identities = dict(self._scan())
        except OSError as error:
            raise InputError("can't list a folder of images", str(error)) from error

    def _scan(self) -> Iterator[tuple[str, str]]:
        """All images with their sizes; symbolic links are followed, but not round in circles."""
        todo: list[tuple[list[str], frozenset[str]]] = [([], frozenset())]
        while todo:
            parts, above = todo.pop()
            folder = os.path.join(self.root, *parts)
            real = os.path.realpath(folder)
            if real in above:
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = [*parts, entry.name]
                    if os.path.isdir(entry.path):  # unlike entry.is_dir, False for a link to itself
                        todo.append((path, above | {real}))
                    elif _wanted(path):
                        # A dangling link is kept: it is a broken image, not none.
                        yield "/".join(path), str(os.path.getsize(entry.path) if os.path.isfile(entry.path) else None)

    def read(self, name: str) -> bytes:
        path = self.root / name
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would block for ever
            raise ValueError("not a regular file")
        if found.st_size > _MAX_BYTES:
            raise ValueError(f"{found.st_size} bytes are more than {_MAX_BYTES}")
        return path.read_bytes()

    def close(self) -> None:
        pass


class _Zip:
    """Members are read one at a time into memory; nothing is ever unpacked to disk."""

    def __init__(self, root: Path):
        self._lock = threading.Lock()  # a ZipFile counts its open members without one
        try:
            self._zip = zipfile.ZipFile(root)
            self._members = dict(self._scan())
        except Exception as error:  # a file that only looks like a zip raises nearly anything
            raise InputError("not a zip of images", f"{root}: {error}", "a folder, or a .zip") from error
        self.identities = {name: f"{info.file_size} {info.CRC}" for name, info in self._members.items()}

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
            # zipfile honours the declared size while it inflates these two only; the others can fill the memory.
            raise ValueError("compressed in another way than zip's usual one")
        with self._lock:
            return self._zip.read(info)

    def close(self) -> None:
        self._zip.close()
