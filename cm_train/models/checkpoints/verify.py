"""Whether a checkpoint is what its manifest says: every file is read, used or not."""

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...core.files import may_pass, not_through_a_link, patiently, unreadable
from ...core.settings import excerpt
from .manifest import MANIFEST, DamagedCheckpoint, Manifest, damaged, read_manifest
from .vanishing import present


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every file has been checked.

    Raises:
        DamagedCheckpoint: a file was read whole and is not what it should be, is missing, or has a hostile header.
        InputError: a file can't be read now, which says nothing about the checkpoint.
        Vanished: the folder was removed meanwhile.
    """
    with present(folder):
        return _verify(folder)


def _verify(folder: Path) -> Manifest:
    def bad(what: str) -> DamagedCheckpoint:
        return damaged(folder, what)

    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        file = folder / name
        if Path(name).name != name or name in ("", ".", ".."):
            raise bad(f"{MANIFEST} names a file outside the folder: {excerpt(name)!r}")
        try:
            size, digest = patiently(lambda: _size_and_sha256(file, entry.size))  # noqa: B023 - called at once
        except FileNotFoundError:
            raise bad(f"{excerpt(name)} is missing") from None
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            if may_pass(error):
                raise unreadable(file, error) from None
            raise bad(f"{excerpt(name)} is not a file") from None
        if size != entry.size:
            raise bad(f"{name} has {size} bytes instead of {excerpt(entry.size)}")
        if digest != entry.sha256:
            raise bad(f"{name} does not match its sha256")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            patiently(lambda: _check_header(file))  # noqa: B023 - called at once
        except (SafetensorError, OSError) as error:
            if may_pass(error):
                raise unreadable(file, error) from None
            raise bad(f"{file.name}: {error}") from None
    return manifest


def _check_header(file: Path) -> None:
    os.close(not_through_a_link(str(file), os.O_RDONLY))
    with safe_open(file, "pt"):  # checks that the header is bounded, and its offsets inside the file
        pass


def _size_and_sha256(file: Path, wanted: int) -> tuple[int, str]:
    """A file's size, and its hash where that is the wanted one: a stranger's file may be as large as it likes."""
    with open(file, "rb", opener=not_through_a_link) as f:
        size = os.fstat(f.fileno()).st_size
        return size, hashlib.file_digest(f, "sha256").hexdigest() if size == wanted else ""
