"""Keyed randomness: every random number is a function of (seed, stream, step, position), never of history.

Nothing here is carried from step to step, so an interrupted run draws what the uninterrupted one would, and
the numbers of image i do not depend on how many processes or micro-batches share the work.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .errors import InputError

# Rows drawn by one generator. A rank draws only the chunks that its rows touch, never the whole global batch.
CHUNK = 32

Versions = Mapping[str, int]
# How a run's numbers are drawn: the order of its images, and all that is drawn for the rows of a batch. Whoever changes
# that adds a version beside the older ones: new runs take the newest, stored ones keep those that they began with. What
# a seed of `PerImageNoise` stands for, and so the image that a sampling seed gives, has no version: it never changes.
NEWEST: Versions = {"order": 1, "rows": 1}


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


def kept_versions(stored: Versions) -> Versions:
    """The versions by which a stored run goes on; the first ones of a run that stored none.

    Raises:
        InputError: the run was begun by a newer cm_train, which draws in a way that is not known here.
    """
    for name, version in stored.items():
        if not 1 <= version <= NEWEST.get(name, 0):
            known = ", ".join(f"{known} 1 to {newest}" for known, newest in NEWEST.items())
            what = "this run draws its random numbers in a way that is not known here"
            raise InputError(what, f"{name} {version}", known, "install the cm-train that it was begun with")
    return {name: stored.get(name, 1) for name in NEWEST}


def permutation(seed: int, stream: str, epoch: int, size: int, version: int = 1) -> Tensor:
    """The order of `size` items in `epoch`, int64 [size] on the CPU."""
    return _ORDERS[version](size, generator(seed, stream, epoch))


def _randperm(size: int, g: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=g)


_ORDERS = {1: _randperm}  # by version


Draw = Callable[[Sequence[int], torch.Generator], Tensor]


class Draws:
    """The random tensors of one training step for some rows of the global batch.

    Args:
        seed, step: the key; the same pair gives the same numbers whenever it is asked.
        rows: consecutive positions in the global batch, 0 <= row.
        device: where the tensors are made; CPU and accelerators give different numbers for one key.
        version: how rows are drawn, see `NEWEST`.
    """

    def __init__(self, seed: int, step: int, rows: range, device: torch.device, version: int = 1):
        assert rows.step == 1 and len(rows) > 0
        self.seed, self.step, self.rows, self.device, self.version = seed, step, rows, device, version

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Unit normal, float32 [len(rows), *shape]."""

        def draw(size: Sequence[int], g: torch.Generator) -> Tensor:
            return torch.randn(size, generator=g, device=self.device)

        return self._rows(stream, draw, shape)

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), float64 [len(rows), *shape]: 53 bits, so that an inverse distribution has tails."""

        def draw(size: Sequence[int], g: torch.Generator) -> Tensor:
            return torch.rand(size, generator=g, device=self.device, dtype=torch.float64)

        return self._rows(stream, draw, shape)

    def bits(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform 32-bit integers, int32 [len(rows), *shape]."""

        def draw(size: Sequence[int], g: torch.Generator) -> Tensor:
            return torch.randint(-(2**31), 2**31, size, generator=g, device=self.device)

        return self._rows(stream, draw, shape).to(torch.int32)

    def _rows(self, stream: str, draw: Draw, shape: Sequence[int]) -> Tensor:
        return _ROWS[self.version](self, stream, draw, shape)


def _rows_in_chunks(draws: Draws, stream: str, draw: Draw, shape: Sequence[int]) -> Tensor:
    """Rows [len(rows), *shape] of chunks that each have a generator of their own."""
    first_chunk, last_chunk = draws.rows[0] // CHUNK, draws.rows[-1] // CHUNK
    chunks = [
        draw((CHUNK, *shape), generator(draws.seed, stream, draws.step, chunk, device=draws.device))
        for chunk in range(first_chunk, last_chunk + 1)
    ]
    offset = draws.rows[0] - first_chunk * CHUNK
    return torch.cat(chunks)[offset : offset + len(draws.rows)]


_ROWS = {1: _rows_in_chunks}  # by version


def image_generator(seed: int, stream: str) -> torch.Generator:
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
        rows = [torch.randn(tuple(shape), generator=image_generator(s, stream)) for s in self.seeds]
        return torch.stack(rows).to(self.device)

    def randint(self, stream: str, high: int) -> Tensor:
        """Integers in [0, high), int64 [len(seeds)]."""
        rows = [torch.randint(high, (), generator=image_generator(s, stream)) for s in self.seeds]
        return torch.stack(rows).to(self.device)
