"""Arrays of bytes as MNIST's files hold them ("idx"), packed by gzip or not; nothing is unpacked to disk."""

import gzip
import math
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from ..core.files import regular

_BYTES = 8  # how a header says that values are unsigned bytes


def read(path: Path, *shape: int) -> Tensor:
    """The uint8 array of exactly this shape in a file, which is unpacked in memory where its name ends in .gz.

    No more is unpacked than such an array has, whatever the file would become.

    Raises:
        OSError: the file can't be read.
        Exception: it is damaged, or holds something else; what gzip raises, or a ValueError that says what is wrong.
    """
    head = bytes([0, 0, _BYTES, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    size = math.prod(shape)
    with open(path, "rb", opener=regular) as file:
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
        _check(stream.read(len(head)), head)
        content = bytearray(stream.read(size))
        if len(content) < size:
            raise ValueError(f"ends after {len(content)} of {size} values")
        if stream.read(1):  # at its end gzip compares its checksum
            raise ValueError(f"goes on after its {size} values")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)


def _check(head: bytes, expected: bytes) -> None:
    """Raise ValueError where a header is not the one expected."""
    if not expected.startswith(head[:4]):
        raise ValueError(f"begins with the bytes {head[:4].hex()}, where {expected[:4].hex()} belongs")
    if len(head) < len(expected):
        raise ValueError(f"ends after {len(head)} bytes")
    if head != expected:
        raise ValueError(f"holds {_shape(head)} values, not {_shape(expected)}")


def _shape(head: bytes) -> str:
    return "x".join(str(int.from_bytes(head[at : at + 4], "big")) for at in range(4, len(head), 4))
