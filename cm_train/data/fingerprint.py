"""What tells one data set from another: of image files, wherever they lie, without decoding any; or of pixels."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from torch import Tensor

from ..core.files import patiently, read_small, unreadable, write_whole
from ..core.progress import progress
from ..core.signals import heed
from ..core.user_cache import cache_folder
from .image_files import ImageFiles, Places, ends

SCHEME = "images:"  # what a fingerprint of `of_images` begins with; `former` knows those of earlier versions
_PART = "/"  # what it has before that which tells a part of a set from the whole
DIGEST_BYTES = hashlib.sha256().digest_size  # of one file
_TOGETHER = 256  # files that a thread looks at in one go
_THREADS = 8  # which mostly wait for a disk, so that more than there are cores pay


def of_images(files: ImageFiles, names: list[str], settings: object, seen: str) -> str:
    """SCHEME and a sha256 in hex of names, sizes, settings and what was seen of the files' bytes.

    Args:
        names: of `files`, sorted; at least one.
        settings: what else makes a difference, as JSON has it.
        seen: see `of_ends`.
    """
    listed = hashlib.sha256(json.dumps([settings, seen]).encode())
    for name, short in zip(names, below_shared(names), strict=True):
        listed.update(json.dumps([short, files.sizes[name]]).encode())
    return SCHEME + listed.hexdigest()


def of_part(whole: str, settings: object) -> str:
    """The fingerprint of a part of the set that is known as `whole`, which begins with that one's.

    Args:
        settings: what says which part it is, as JSON has it.
    """
    return f"{whole}{_PART}{hashlib.sha256(json.dumps(settings).encode()).hexdigest()}"


def of_whole(part: str) -> str:
    """The fingerprint of the set that this is one of a part of, or else itself."""
    return part.partition(_PART)[0]


def below_shared(names: list[str]) -> list[str]:
    """Sorted names without the folders that all of them have in common.

    Those don't tell one file from another, and whoever packs a set adds or drops some.
    """
    shared = os.path.commonpath([os.path.dirname(name) for name in (names[0], names[-1])])  # and so all between
    start = len(shared) + 1 if shared else 0
    return [name[start:] for name in names]


def of_ends(files: ImageFiles, names: list[str]) -> str:
    """A sha256 in hex of the first and last 4 KiB of each file, looked at once for as long as none is written to.

    Raises:
        InputError: a file can't be read now.
    """
    found = remembered(files, names, "ends", lambda: bytes.fromhex(together(look_at(files, names))), DIGEST_BYTES)
    return found.hex()


def digests_of(files: ImageFiles, names: list[str]) -> bytes:
    """What `look` finds in each file, one after another, likewise remembered. Raises InputError, see `of_ends`."""
    return remembered(files, names, "each", lambda: b"".join(look_at(files, names)), len(names) * DIGEST_BYTES)


def of_pixels(shape: tuple[int, ...], images: Iterable[Tensor], labels: Tensor | None) -> str:
    """A sha256 in hex of a set's shape [N, C, S, S], its images in uint8 parts of that, and its labels."""
    digest = hashlib.sha256(str(shape).encode())
    for part in images:
        digest.update(part.cpu().contiguous().numpy().data)
    if labels is not None:
        digest.update(labels.cpu().numpy().data)
    return digest.hexdigest()


def of_content(content: bytes) -> bytes:
    """What `look` finds at the ends of a file of this content."""
    return hashlib.sha256(b"".join(content[place] for place in ends(len(content)))).digest()


def look(files: ImageFiles, name: str, places: Places = ends) -> bytes:
    """The sha256 of a file's bytes at `places`. Raises InputError where it can't be read now."""
    try:
        return hashlib.sha256(patiently(lambda: files.sample(name, places))).digest()
    except OSError as error:
        raise unreadable(name, error) from None


def look_at(
    files: ImageFiles, names: list[str], places: Places = ends, num_together: int = _TOGETHER
) -> Iterator[bytes]:
    """What `look` finds in each file, so many at a time, in parallel. Raises InputError where one can't be read now."""

    def look_at_some(chunk: list[str]) -> bytes:
        found = []
        for name in chunk:
            heed()
            found.append(look(files, name, places))
        return b"".join(found)

    chunks = [names[start : start + num_together] for start in range(0, len(names), num_together)]
    with ThreadPoolExecutor(_THREADS) as pool, progress(len(names), "looking at images") as bar:
        for chunk, found in zip(chunks, pool.map(look_at_some, chunks), strict=True):
            yield found
            bar.advance(len(chunk))


def together(digests: Iterable[bytes | bytearray]) -> str:
    """A sha256 in hex of the digests of all files, in any number of parts."""
    whole = hashlib.sha256()
    for part in digests:
        whole.update(part)
    return whole.hexdigest()


def remembered(files: ImageFiles, names: list[str], what: str, find: Callable[[], bytes], num_bytes: int) -> bytes:
    """What `find` returns, `num_bytes`, from the user's cache where no file was written to or replaced since.

    It is kept with its sha256.
    """
    key = hashlib.sha256(what.encode())
    for name in names:
        key.update(json.dumps([name, files.sizes[name], files.stamps[name]]).encode())
    path = cache_folder("fingerprints") / key.hexdigest()
    with suppress(OSError, ValueError):
        kept = read_small(path, num_bytes + DIGEST_BYTES)
        known, its_hash = kept[:num_bytes], kept[num_bytes:]
        if hashlib.sha256(known).digest() == its_hash:
            return known
    found = find()
    with suppress(OSError):  # it is no more than a shortcut
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, found + hashlib.sha256(found).digest())
    return found
