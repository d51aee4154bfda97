"""Keyed randomness: every random number is a function of (seed, stream, step, position), never of history.

Nothing here is carried from step to step, so an interrupted run draws what the uninterrupted one would, and
the numbers of image i do not depend on how many processes or micro-batches share the work.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# Rows drawn by one generator. A rank draws only the chunks that its rows touch, never the whole global batch.
CHUNK = 32


def key(*parts: int | str) -> int:
    """A 64-bit hash of `parts`.

    CPU generators read only the low 32 bits of a seed, so seeds that differ above them (1 and 1 + 2**32) or by a
    small step must be hashed, not added.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # manual_seed takes a signed 64-bit integer


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by `key(*parts)`."""
    return torch.Generator(device).manual_seed(key(*parts))


def permutation(seed: int, stream: str, epoch: int, size: int) -> Tensor:
    """The order of `size` items in `epoch`, int64 [size] on the CPU."""
    return torch.randperm(size, generator=generator(seed, stream, epoch))


class Draws:
    """The random tensors of one training step for some rows of the global batch.

    Args:
        seed, step: the key; the same pair gives the same numbers whenever it is asked.
        rows: consecutive positions in the global batch, 0 <= row.
        device: where the tensors are made; CPU and accelerators give different numbers for one key.
    """

    def __init__(self, seed: int, step: int, rows: range, device: torch.device):
        assert rows.step == 1 and len(rows) > 0
        self.seed, self.step, self.rows, self.device = seed, step, rows, device

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Unit normal, float32 [len(rows), *shape]."""
        return self._rows(stream, lambda size, g: torch.randn(size, generator=g, device=self.device), shape)

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), float64 [len(rows), *shape]: 53 bits, so that an inverse distribution has tails."""
        draw = lambda size, g: torch.rand(size, generator=g, device=self.device, dtype=torch.float64)  # noqa: E731
        return self._rows(stream, draw, shape)

    def bits(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform 32-bit integers, int32 [len(rows), *shape]."""
        draw = lambda size, g: torch.randint(-(2**31), 2**31, size, generator=g, device=self.device)  # noqa: E731
        return self._rows(stream, draw, shape).to(torch.int32)

    def _rows(self, stream: str, draw, shape: Sequence[int]) -> Tensor:
        first, last = self.rows[0] // CHUNK, self.rows[-1] // CHUNK
        chunks = [
            draw((CHUNK, *shape), generator(self.seed, stream, self.step, chunk, device=self.device))
            for chunk in range(first, last + 1)
        ]
        offset = self.rows[0] - first * CHUNK
        return torch.cat(chunks)[offset : offset + len(self.rows)]


def _image_generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator of its own for every seed below 2^32 in a stream.

    The generator reads 32 bits, so a hash would give some pair of 100,000 images the same noise; a bijection can't.
    """
    bits = (seed & 0xFFFFFFFF) ^ (key("image", stream, seed >> 32) & 0xFFFFFFFF)
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # a finaliser: neighbours get distant states
        bits = ((bits ^ (bits >> shift)) * multiplier) & 0xFFFFFFFF
    return torch.Generator().manual_seed(bits ^ (bits >> 16))


class PerImageNoise:
    """Noise whose image i depends on `seeds[i]` alone: not on batch, sampler, checkpoint or device.

    Each `randn` call with a new `stream` gives new numbers; drawn on the CPU so that every device agrees.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.seeds, self.device = list(seeds), device

    def randn(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Unit normal, float32 [len(seeds), *shape]."""
        rows = [torch.randn(tuple(shape), generator=_image_generator(s, stream)) for s in self.seeds]
        return torch.stack(rows).to(self.device)

    def randint(self, stream: str, high: int) -> Tensor:
        """Integers in [0, high), int64 [len(seeds)]."""
        rows = [torch.randint(high, (), generator=_image_generator(s, stream)) for s in self.seeds]
        return torch.stack(rows).to(self.device)
