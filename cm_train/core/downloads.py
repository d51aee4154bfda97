"""Files from the web: fetched whole and checked, or not at all, by one process at a time."""

import fcntl
import hashlib
import os
import secrets
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from .progress import progress
from .signals import heed

_TIMEOUT_S = 30.0  # without one a silent server would hang the command for ever
_CHUNK = 2**16
_LOOK_S = 0.2  # between two looks at a lock
_MB = 10**6
_PART = ".part"  # how the names of unfinished files end


class _Failed(Exception):
    """A mirror did not give the file; the next one may."""


def download(urls: Sequence[str], path: Path, algorithm: str, digest: str, what: str) -> None:
    """Fetch a file from the first of its mirrors that has it.

    Args:
        algorithm: of hashlib, by which the file has this `digest` in hex, or one that begins so.
        what: what is being fetched, for the user.

    Raises:
        OSError: no mirror gave the file, or it can't be written; nothing is left of it.
    """
    failed = []
    for url in urls:
        # No two processes write to one file, though disks without locks let them fetch the same.
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
        try:
            found = _receive(url, part, algorithm, what)
            if not found.startswith(digest):
                raise _Failed(f"what came has the {algorithm} {found}, not {digest}")
            os.replace(part, path)
            return
        except _Failed as error:
            failed.append(f"{url}: {error}")
        finally:
            part.unlink(missing_ok=True)
    raise OSError("; ".join(failed))


def _receive(url: str, part: Path, algorithm: str, what: str) -> str:
    """Write what `url` gives; returns its digest."""
    sums, got = hashlib.new(algorithm, usedforsecurity=False), 0
    request = urllib.request.Request(url, headers={"User-Agent": "cm-train"})
    with _network():
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    total = answer.length
    with answer, open(part, "xb") as file, progress(total and -(-total // _MB), f"fetching {what}, MB") as bar:
        while True:
            heed()
            with _network():
                chunk = answer.read1(_CHUNK)  # what has arrived, so that a slow line doesn't keep a signal waiting
            if not chunk:
                break
            file.write(chunk)
            sums.update(chunk)
            got += len(chunk)
            bar.update(got // _MB)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and got < total:
        raise _Failed(f"the connection ended after {got} of {total} bytes")
    return sums.hexdigest()


@contextmanager
def _network() -> Iterator[None]:
    """Around what fails for reasons of a mirror, not of this machine's disk."""
    try:
        yield
    except (OSError, HTTPException) as error:
        reason = error.reason if type(error) is URLError else error
        raise _Failed(str(reason) or type(error).__name__) from error


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Hold a lock on `folder`: the ranks of a run start together, and only one of them may fetch `what` into it.

    The lock is on the folder itself, so that no file is left in it. Who waits shows how far the other one is.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with progress(None, f"fetching {what}, MB") as bar:
            while not _locks(handle):
                heed()
                bar.update(_unfinished(folder) // _MB)
                time.sleep(_LOOK_S)
        yield
    finally:
        os.close(handle)


def _locks(handle: int) -> bool:
    """Whether nobody else is there any more; a disk without locks keeps nobody out."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _unfinished(folder: Path) -> int:
    """Bytes of what is being fetched into a folder."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # just renamed
                total += entry.stat(follow_symlinks=False).st_size if entry.name.endswith(_PART) else 0
    return total
