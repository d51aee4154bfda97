"""The images of a folder, its links followed."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import InputError
from ..core.files import may_pass, patiently, regular
from ..core.progress import progress
from ..core.signals import heed
from .image_files import ImageFiles, Places, check_size, stamp

_MAX_VISITS = 64  # of one real folder, by links: a few that point at each other can stand for millions


class FolderFiles(ImageFiles):
    """Images are read where they are.

    Raises:
        InputError: it, or a folder below it, can't be listed.
    """

    def __init__(self, root: Path):
        super().__init__()
        self.root = root
        try:
            with progress(None, "listing images") as bar:
                for name, found in self._scan():
                    self.sizes[name] = None if found is None else found.st_size
                    self.stamps[name] = "" if found is None else stamp(found)
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
                elif self._is_image(path):
                    yield "/".join(path), found if found is not None and stat.S_ISREG(found.st_mode) else None

    def read(self, name: str) -> bytes:
        path = self.root / name
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            check_size(size)
            return file.read(size)

    def sample(self, name: str, places: Places) -> bytes:
        try:
            with open(self.root / name, "rb", buffering=0, opener=regular) as file:
                found = places(os.fstat(file.fileno()).st_size)
                return b"".join(os.pread(file.fileno(), place.stop - place.start, place.start) for place in found)
        except (ValueError, OSError) as error:
            if may_pass(error):
                raise
            return b""

    def former(self, name: str) -> tuple[str, int | None, None]:
        return name, self.sizes[name], None


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
