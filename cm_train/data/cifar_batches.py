"""CIFAR's batches of images, in their folder or their archive; nothing is unpacked to disk."""

import gzip
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, cast

import torch
from torch import Tensor

from ..core.files import read_small, regular
from ..core.settings import excerpt
from ..core.signals import heed
from . import cifar_pickles

_SIDE = 32
_VALUES = 3 * _SIDE**2  # of an image
_MOST_MEMBERS = 100  # of an archive, which has 9


def read(path: Path, names: Sequence[str], rows: int) -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 3, 32, 32], and labels, int64 [N], of the batches called `names`, each of `rows` images.

    Raises:
        OSError: a file can't be read.
        Exception: it is damaged, or holds something else; what gzip or tarfile raise, or a ValueError that says what
            is wrong.
    """
    most = 2**20 + 2 * rows * (_VALUES + 50)  # bytes of a batch; one written by Python 3 has twice those of the pixels
    batches = {}
    for name, content in (_in_folder if path.is_dir() else _in_archive)(path, names, most):
        heed()
        try:
            batches[name] = read_batch(content, rows)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    for name in names:
        if name not in batches:
            raise ValueError(f"{name} is missing")
    images, labels = zip(*(batches[name] for name in names), strict=True)
    return torch.cat(images).view(-1, 3, _SIDE, _SIDE), torch.cat(labels)


def _in_folder(folder: Path, names: Sequence[str], most: int) -> Iterator[tuple[str, bytes]]:
    for name in names:
        yield name, read_small(folder / name, most, regular)


def _in_archive(path: Path, names: Sequence[str], most: int) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb", opener=regular) as file, gzip.GzipFile(fileobj=file) as unpacked:
        stream = _Bounded(unpacked, 7 * most)  # all six, and what lies beside them
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
            for count, member in enumerate(archive):
                if count >= _MOST_MEMBERS or member.size > most:
                    raise ValueError(f"holds {excerpt(member.name)}, more than such an archive has")
                name = PurePosixPath(member.name).name
                if name in names and member.isreg() and (content := archive.extractfile(member)) is not None:
                    yield name, content.read()
        while stream.read(2**16):  # at its end gzip compares its checksum
            pass


class _Bounded:
    """A stream that fails where it gives more than `most` bytes, as a small file made for harm may."""

    def __init__(self, stream: gzip.GzipFile, most: int):
        self._stream, self._most, self._got = stream, most, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._got += len(data)
        if self._got > self._most:
            raise ValueError(f"unpacks to more than {self._most} bytes")
        return data


def read_batch(content: bytes, rows: int) -> tuple[Tensor, Tensor]:
    """Pixels, uint8 [rows, 3072], and labels, int64 [rows]. Raises ValueError where a batch holds anything else."""
    batch = cifar_pickles.parse(content, 1000 + 10 * rows)
    if not isinstance(batch, dict):
        raise ValueError("holds no dictionary")
    labels = batch.get("labels")
    if not isinstance(labels, list) or len(labels) != rows:
        raise ValueError(f"holds no list of {rows} labels")
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise ValueError("holds a label that is none of 0 to 9")
    pixels = cifar_pickles.array_of_bytes(batch.get("data"), (rows, _VALUES))
    return pixels, torch.tensor(labels, dtype=torch.int64)
