"""How earlier versions saw a set of image files: by what their runs and teachers still know it.

Once it was "files:" and a sha256 where images were decoded on the fly, and the sha256 of all pixels where they were in
memory. Version 0.1.0 knew sets that it decoded on the fly by a plain sha256 of their listing.
"""

import hashlib
from collections.abc import Callable

from torch import Tensor

from ..core.errors import InputError
from . import image_labels
from .fingerprint import DIGEST_BYTES, look_at, remembered
from .image_files import ImageFiles

_BYTES = 2**14  # of a file, at its beginning, middle and end
_TOGETHER = 256  # files whose digests had one of their own


def is_name_of(
    recorded: str, files: ImageFiles, names: list[str], settings: object, pixels: Callable[[list[str]], str]
) -> bool:
    """Whether an earlier version called this set `recorded`.

    Args:
        names: of `files`, all of them.
        settings: what else made a difference, see `settings_of`.
        pixels: the sha256 of all pixels and labels in the order of the names that it is given.
    """
    scheme, _, digest = recorded.rpartition(":")
    names = sorted(names, key=lambda name: files.former(name)[0])
    if scheme == "files":
        return digest == _of_files(files, names, settings)
    return not scheme and (digest == _listing(files, names, settings).hexdigest() or digest == pixels(names))


def settings_of(
    basis: tuple[object, ...], class_names: list[str], labels: Tensor | None, first: Tensor | None
) -> object:
    """Settings as they were written down: with the labels where those were others than `first_labels`."""
    if labels is None or (first is not None and first.equal(labels)):
        return basis
    return *basis, class_names, hashlib.sha256(labels.numpy().data).hexdigest()


def first_labels(files: ImageFiles, names: list[str], root: str) -> tuple[list[str], Tensor] | None:
    """Class names and labels as the first version gave them, which sorted folders as text and knew no lists."""
    names = [files.former(name)[0] for name in names]
    try:
        return image_labels.by_folder(names, root, 1 + image_labels.dividing_level(names), order=str)
    except InputError:
        return None


def _of_files(files: ImageFiles, names: list[str], settings: object) -> str:
    listed = _listing(files, names, settings)
    if files.former(names[0])[2] is None:
        listed.update(remembered(files, names, "former", lambda: _looked_at(files, names), DIGEST_BYTES))
    return listed.hexdigest()


def _listing(files: ImageFiles, names: list[str], settings: object) -> "hashlib._Hash":
    listed = hashlib.sha256(repr(settings).encode())
    for name, size, checksum in map(files.former, names):
        listed.update(repr((name, f"{size}" if checksum is None else f"{size} {checksum}")).encode())
    return listed


def _looked_at(files: ImageFiles, names: list[str]) -> bytes:
    whole = hashlib.sha256()
    for digests in look_at(files, names, _places, _TOGETHER):
        whole.update(hashlib.sha256(digests).digest())
    return whole.digest()


def _places(size: int) -> list[slice]:
    starts = {0, max(0, size // 2 - _BYTES // 2), max(0, size - _BYTES)}
    return [slice(start, min(size, start + _BYTES)) for start in sorted(starts)]
