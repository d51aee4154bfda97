"""What tells one set of image files from another, without decoding any."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

from ..core.files import patiently, read_small, unreadable, write_whole
from ..core.progress import progress
from ..core.signals import heed
from .image_files import ImageFiles

_CHUNK = 256  # files a thread looks at in one go


def of_listing(files: ImageFiles, names: list[str], settings: object) -> str:
    """A sha256 in hex of names, of what is known of each file without reading it, and of settings."""
    return _listing(files, names, settings).hexdigest()


def of_files(files: ImageFiles, names: list[str], settings: object, pool: Executor) -> str:
    """ "files:" and a sha256 in hex of names, sizes, settings and a sample of each file's bytes.

    The bytes are looked at once, and remembered in the user's cache for as long as no file is written to or replaced.

    Args:
        names: of `files`, in the order that matters.
        settings: what else makes a difference, as its repr shows it.

    Raises:
        InputError: a file can't be read now.
    """
    listed = _listing(files, names, settings)
    if not files.stamps:
        return f"files:{listed.hexdigest()}"
    stamped = listed.copy()
    for name in names:
        stamped.update(f"{files.stamps[name]} ".encode())
    known = _cache() / stamped.hexdigest()
    with suppress(OSError, ValueError):
        if len(digest := read_small(known, 64).decode("ascii")) == 64:
            return f"files:{digest}"
    listed.update(_sampled(files, names, pool))
    with suppress(OSError):  # it is no more than a shortcut
        known.parent.mkdir(parents=True, exist_ok=True)
        write_whole(known, listed.hexdigest().encode())
    return f"files:{listed.hexdigest()}"


def _listing(files: ImageFiles, names: list[str], settings: object) -> "hashlib._Hash":
    listed = hashlib.sha256(repr(settings).encode())
    for name in names:
        listed.update(repr((name, files.identities[name])).encode())
    return listed


def _sampled(files: ImageFiles, names: list[str], pool: Executor) -> bytes:
    def digest(chunk: Iterable[str]) -> bytes:
        sums = hashlib.sha256()
        for name in chunk:
            heed()
            try:
                sums.update(hashlib.sha256(patiently(lambda: files.sample(name))).digest())  # noqa: B023 - called at once
            except OSError as error:
                raise unreadable(name, error) from None
        return sums.digest()

    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    whole = hashlib.sha256()
    with progress(len(names), "looking at images") as bar:
        for chunk, part in zip(chunks, pool.map(digest, chunks), strict=True):
            whole.update(part)
            bar.advance(len(chunk))
    return whole.digest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm-train" / "fingerprints"
