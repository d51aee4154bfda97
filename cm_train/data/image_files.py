"""Image files as users have them: listed in a folder or a zip from anywhere, and read with bounds."""

import errno
import os
import stat
import threading
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..core.errors import InputError
from ..core.files import may_pass, patiently, regular
from ..core.progress import progress
from ..core.signals import heed

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
_MAX_VISITS = 64  # of one real folder, by links: a few that point at each other can stand for millions
_SAMPLED_BYTES = 2**14  # of a file, at its beginning, middle and end, to tell it from others of its name and size


class ImageFiles(Protocol):
    """Where images come from.

    Attributes:
        identities: for each relative path (with /) what is known of its content without reading it.
        stamps: for each what changes when it is written to, where `identities` does not tell contents apart.
        unread: the relative paths of pictures that are not read, for each of their endings.
        label_files: the relative paths of all files that are called LABELS.
        doubled: how many more there are than names, as a zip may have; the last one of a name counts.
    """

    identities: dict[str, str]
    stamps: dict[str, str]
    unread: dict[str, list[str]]
    label_files: list[str]
    doubled: int

    def read(self, name: str) -> bytes:
        """The whole file. Raises OSError, or ValueError where it is none that may be read."""

    def sample(self, name: str) -> bytes:
        """A few bytes that tell it from most other files of its size; none where its identity does. Raises OSError."""

    def close(self) -> None: ...


def open_files(root: str) -> ImageFiles:
    """The image files of a folder, of a .zip or of a folder in a .zip, read in place. Raises InputError without any."""
    path = Path(os.path.expanduser(root))  # os.path's functions take any text: no such user, a name too long
    if os.path.isdir(path):
        return _Folder(path)
    for archive in (path, *path.parents):
        if os.path.isfile(archive):
            return _Zip(archive, path.relative_to(archive).parts)
    raise InputError("no such data", str(path), "a folder of images, or a .zip of them", "set dataset.root=...")


class _Found:
    """What a scan has come across."""

    def __init__(self) -> None:
        self.identities: dict[str, str] = {}
        self.stamps: dict[str, str] = {}
        self.unread: dict[str, list[str]] = defaultdict(list)
        self.label_files: list[str] = []
        self.doubled = 0

    def is_image(self, parts: list[str]) -> bool:
        """Whether a path is an image that a person put there: nothing hidden, and nothing that only macOS needs."""
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return False
        name, ending = "/".join(parts), os.path.splitext(parts[-1])[1].lower()
        if ending in _UNREAD:
            self.unread[ending].append(name)
        if parts[-1].lower() == LABELS:
            self.label_files.append(name)
        return ending in SUFFIXES


class _Folder(_Found):
    def __init__(self, root: Path):
        super().__init__()
        self.root = root
        try:
            with progress(None, "listing images") as bar:
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
                heed()
                path, found = [*parts, entry.name], _stat(entry.path)
                if found is not None and stat.S_ISDIR(found.st_mode):
                    todo.append((path, above | {real}))
                elif self.is_image(path):
                    yield "/".join(path), found if found is not None and stat.S_ISREG(found.st_mode) else None

    def read(self, name: str) -> bytes:
        path = self.root / name
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise ValueError(f"{size} bytes are more than {_MAX_BYTES}")
            return file.read(_MAX_BYTES)

    def sample(self, name: str) -> bytes:
        try:
            with open(self.root / name, "rb", buffering=0, opener=regular) as file:
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


class _Zip(_Found):
    """Members are read one at a time into memory; nothing is ever unpacked to disk.

    Args:
        below: the folder inside the archive from which on names count.
    """

    def __init__(self, root: Path, below: tuple[str, ...] = ()):
        super().__init__()
        self._lock = threading.Lock()  # a ZipFile counts its open members without one
        try:
            self._zip = zipfile.ZipFile(root)
            members = list(self._scan(list(below)))
            self._members = dict(members)
            self.doubled = len(members) - len(self._members)
            if sum(info.compress_size for info in self._members.values()) > root.stat().st_size:
                raise ValueError("its members overlap")  # so that a small file inflates for ever
        except Exception as error:  # a file that only looks like a zip raises nearly anything
            fix = f"dataset.root={root.parent} for the folder that it is in"
            raise InputError("not a zip of images", f"{root}: {error}", "a folder, or a .zip", fix) from error
        images = [name for name in self._members if name not in self.label_files]
        self.identities = {name: f"{self._members[name].file_size} {self._members[name].CRC}" for name in images}

    def _scan(self, below: list[str]) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        for info in self._zip.infolist():
            heed()
            parts = [part for part in info.filename.replace("\\", "/").split("/") if part not in ("", ".")]
            inner = parts[len(below) :]
            is_inside = bool(inner) and parts[: len(below)] == below and not info.is_dir()
            if is_inside and (self.is_image(inner) or inner[-1].lower() == LABELS):
                yield "/".join(inner), info

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
