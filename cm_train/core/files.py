"""Files of runs: written whole or not at all, never through a stranger's link, read again where reading fails."""

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard, TypeVar

from .errors import InputError

T = TypeVar("T")

# What says something about a file: that it is not there, or no file. All else may be over in a moment: a network's file
# system has many words for being away.
_NAMES = "ENOENT ENOTDIR EISDIR ELOOP ENAMETOOLONG EINVAL ENXIO ENODEV"
_LASTING = frozenset(getattr(errno, name) for name in _NAMES.split())
_RETRY_AFTER_S = (0.1, 0.5, 2.0)


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns; it is asked again a few times where it fails for a reason that may pass. Raises OSError."""
    for pause in _RETRY_AFTER_S:
        try:
            return read()
        except OSError as error:
            if not may_pass(error):
                raise
        time.sleep(pause)
    return read()


def may_pass(error: Exception) -> TypeGuard[OSError]:
    """Whether an error says of a file nothing more than that it can't be read now."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _LASTING


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether something has this name, be it a link to nothing. Raises OSError where that can't be told now."""
    try:
        patiently(lambda: os.lstat(path))
    except OSError as error:
        if may_pass(error):
            raise
        return False
    return True


def unreadable(file: str | os.PathLike[str], error: OSError) -> InputError:
    """What to raise about a file that could not be read even `patiently`."""
    if isinstance(error, PermissionError):
        return InputError(f"{file} may not be read by this user", fix="ask its owner for chmod -R a+r")
    fix = "look at the disk or its network; nothing was changed, and the same command goes on from here"
    return InputError(f"{file} can't be read now: {error.strerror or error}", fix=fix)


def regular(path: str, flags: int) -> int:
    """For `open`: a regular file, where it says. A pipe would block for ever."""
    handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return handle


def not_through_a_link(path: str, flags: int) -> int:
    """For `open`: a regular file by its own name. A link might lead out of a stranger's folder."""
    return regular(path, flags | os.O_NOFOLLOW)


def read_small(path: Path, most: int, opener: Callable[[str, int], int] = not_through_a_link) -> bytes:
    """A file of at most `most` bytes, patiently. Raises OSError, or ValueError where it is larger."""

    def read() -> bytes:
        with open(path, "rb", opener=opener) as file:
            return file.read(most + 1)

    content = patiently(read)
    if len(content) > most:
        raise ValueError(f"larger than {most} bytes")
    return content


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before, even after a power cut."""
    beside = path.with_name(f".{path.name}.writing")
    with open(beside, "wb", opener=not_through_a_link) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
