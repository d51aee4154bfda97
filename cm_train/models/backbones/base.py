"""What backbones share: blocks that can be compiled, keyed dropout and the noise-level embedding."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.registry import ComponentConfig
from ...core.settings import OF_RECIPE


class BackboneConfig(ComponentConfig):
    """The `backbone` group."""

    kind: ClassVar = "backbone"

    dropout: Annotated[float, Field(ge=0, lt=1), OF_RECIPE] = 0.0

    @property
    def num_augment_labels(self) -> int:
        """How many numbers the network may be given that say how an image was augmented."""
        return 0

    def with_recipe_of(self, other: "BackboneConfig") -> Self:
        """The same network, trained as `other` says."""
        keys = self.marked(OF_RECIPE) & other.marked(OF_RECIPE)
        return self.model_copy(update={key: getattr(other, key) for key in keys})


class Block(nn.Module):
    """A part of a backbone that is compiled by itself: enough work for one graph, and repeated many times.

    Attributes:
        compiled: what is called in place of `forward`, with the block and its inputs; None calls `forward`.
        recomputed: whether a backward pass computes it again from its inputs, and so keeps nothing else of it.
    """

    compiled: Callable[..., Tensor] | None = None
    recomputed = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        if self.recomputed and torch.is_grad_enabled() and not _as_written:
            # Nothing random to bring back: dropout's masks hang on their keys.
            again: Tensor = checkpoint(self._once, *inputs, use_reentrant=False, preserve_rng_state=False)
            return again
        return self._once(*inputs)

    def _once(self, *inputs: Tensor | None) -> Tensor:
        if self.compiled is None or _as_written:
            return super().__call__(*inputs)
        return self.compiled(self, *inputs)


class Constrained(nn.Module):
    """A layer whose weights lie on a surface, to which `constrain` brings them back after each optimizer step."""

    def constrain(self, applied: Tensor | None = None) -> None:
        """Move the weights onto the surface, in place and without waiting for the device.

        Args:
            applied: 0-dim float on the device, 0.0 where the step was skipped and nothing may move; None means 1.
        """
        raise NotImplementedError


@torch.no_grad()
def constrain(network: nn.Module, applied: Tensor | None = None) -> None:
    """`constrain` each layer of `network` that is `Constrained`."""
    for layer in network.modules():
        if isinstance(layer, Constrained):
            layer.constrain(applied)


def recompute_blocks(network: nn.Module) -> None:
    """Activation checkpointing (Chen et al. 2016): each block of `network` is `recomputed`."""
    for block in network.modules():
        if isinstance(block, Block):
            block.recomputed = True


_as_written: list[None] = []  # one entry for each context that is open


@contextlib.contextmanager
def blocks_as_written() -> Iterator[None]:
    """A context in which no block is called compiled: a compiled one has no forward-mode derivative."""
    _as_written.append(None)
    try:
        yield
    finally:
        _as_written.pop()


def _scrambled(count: int, salt: int) -> Tensor:
    """`count` <= 2^24 fixed pseudo-random int32, other ones for each salt < 256, by a 32-bit finaliser."""
    x = (torch.arange(count, dtype=torch.int64) + (salt << 24)) & 0xFFFFFFFF
    for multiplier, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
        x = x ^ (x >> shift)
    return (x - 2**31).to(torch.int32)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a pure function of a key per image: multiply-shift hashing of each position.

    Nothing is drawn, so it compiles, is the same for any batch split and after any resume, and two passes that
    are given the same keys lose the same units. Without keys it is the identity.

    Args:
        p: probability of a zero.
        shape: (C, H, W) of the input.
        salt: a number of its own for each layer, so that layers lose different units.
    """

    positions: Tensor

    def __init__(self, p: float, shape: tuple[int, int, int], salt: int):
        super().__init__()
        self.p = p
        if p > 0:
            self.register_buffer("positions", _scrambled(math.prod(shape), salt).view(shape), persistent=False)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        if self.p == 0 or keys is None:
            return x
        multiplier, offset = keys[:, 0] | 1, keys[:, 1]  # odd, so that the product is a permutation of 32 bits
        hashed = self.positions * multiplier.view(-1, 1, 1, 1) + offset.view(-1, 1, 1, 1)  # wraps around
        threshold = round(self.p * 2**32) - 2**31
        return torch.where(hashed >= threshold, x / (1 - self.p), 0.0)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 where it is of less precision than that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """A context for `x`'s device where autocast is off: noise levels that lie close must not round to the same."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def sinusoidal_embedding(c_noise: Tensor, width: int) -> Tensor:
    """[cos, sin] of c_noise at frequencies 10000^(-i / (width / 2)); [B] -> [B, width], in float32 at least."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=c_noise.device))
    angles = at_least_float32(c_noise)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
