"""How many images go through the networks at once: as many as fit, settled once, before the first step."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..core.errors import OutOfMemory
from ..core.free_memory import free_bytes
from ..core.memory import needed_memory, shortage_explained
from ..core.world import World
from ..objectives.base import Objective
from .config import RunConfig
from .sketch import ACTIVATIONS, state_bytes

_SHARE = 0.5  # of what is free that may be filled: other programs, and the network's larger inputs, want some too
_NO_TRY = 0.1  # of what is free, below which an estimate needs no proof


@dataclass(frozen=True)
class Need:
    """What a training step takes on one rank, in bytes, by an estimate.

    Attributes:
        rest: whatever the number of images.
        an_image: for each of those that are in the networks at once.
        free: that the rank with the least has, before anything of that is there.
        fix: what a person can do where one image is too much.
    """

    rest: int
    an_image: int
    free: int
    fix: str = ""

    def of(self, num: int) -> int:
        """For so many images at once."""
        return self.rest + num * self.an_image

    def say_of(self, num: int) -> str:
        """In words."""
        return f"about {_gib(self.of(num))} for {num} images at once, and {_gib(self.free)} are free"


def need(
    config: RunConfig, objective: Objective, device: torch.device, autocast: torch.dtype | None, world: World
) -> Need:
    """What a step of `objective` takes; called by every rank, and the same on all.

    Raises:
        OutOfMemory: not even one image has room.
    """
    free = int(-world.largest(-free_bytes(device, world.num_here)))  # where there is least
    fix = "a smaller backbone= or dataset.image_size="
    if not config.activation_checkpointing:
        fix = f"activation_checkpointing=true, or {fix}"
    with shortage_explained("before the first step", fix):
        saved = saved_bytes(objective, device, autocast)
    found = Need(state_bytes(config, objective), round(ACTIVATIONS * saved), free, fix)
    if found.of(1) > free:
        raise OutOfMemory("before the first step", found.say_of(1), fix)
    return found


def settle(
    share: int, needed: Need, objective: Objective, device: torch.device, autocast: torch.dtype | None, world: World
) -> int:
    """The largest divisor of a rank's share of the batch that fits in half of what is free; called by every rank.

    Raises:
        OutOfMemory: not even one image fits.
    """
    found = next((m for m in _divisors(share) if needed.of(m) <= _SHARE * needed.free), 1)
    while needed.of(found) > _NO_TRY * needed.free:
        if not any(world.any_rank(not _fits(objective, found, device, autocast))):
            break
        smaller = [m for m in _divisors(share) if m < found]
        if not smaller:
            raise OutOfMemory("before the first step", needed.say_of(1), needed.fix)
        found = smaller[0]
    return found


def check_fits(at_once: int, share: int, needed: Need) -> None:
    """Refuse to go on with a run whose micro-batch was settled where more memory was free. Raises OutOfMemory."""
    if needed.of(at_once) > needed.free:
        smaller = [m for m in _divisors(share) if m < at_once]
        fix = f"micro_batch={smaller[0]} or less" if smaller else needed.fix
        raise OutOfMemory("before the first step", needed.say_of(at_once), fix)


def saved_bytes(objective: Objective, device: torch.device, autocast: torch.dtype | None) -> int:
    """What the backward pass of one image waits for."""
    seen: dict[int, Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in own:
            seen[place] = x
        return x

    hooks: AbstractContextManager[None] = saved_tensors_hooks(pack, lambda x: x)
    with hooks:
        loss = _loss(objective, 1, device, autocast)
    del loss
    return sum(x.untyped_storage().nbytes() for x in seen.values())


def _loss(objective: Objective, num: int, device: torch.device, autocast: torch.dtype | None) -> Tensor:
    """The loss of black images, drawn as the first step's."""
    config = objective.denoiser.config
    black = torch.zeros(num, *config.image_shape, device=device)
    labels = torch.zeros(num, dtype=torch.int64, device=device) if config.num_classes else None
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        loss, _ = objective(objective.draw(black, labels, 0, range(num)))
    total: Tensor = loss.sum()
    return total


def _fits(objective: Objective, num: int, device: torch.device, autocast: torch.dtype | None) -> bool:
    """Whether a step's passes on so many images find the memory that they want; nothing remains of them."""
    fits = True
    try:
        _loss(objective, num, device, autocast).backward()
    except Exception as error:
        if needed_memory(error) is None:
            raise
        fits = False
    for parameter in objective.parameters():
        parameter.grad = None
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return fits


def _divisors(share: int) -> Iterator[int]:
    """Of a rank's images a step, the largest first."""
    return (m for m in range(share, 0, -1) if share % m == 0)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
