"""How many images go through the networks at once: as many as fit, settled once, before the first step."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..core.errors import OutOfMemory
from ..core.free_memory import free_bytes
from ..core.memory import needed_memory
from ..core.terminal import say
from ..core.world import World
from ..objectives.base import Objective
from .config import RunConfig
from .sketch import ACTIVATIONS, state_bytes

_SHARE = 0.5  # of what is free that may be filled: other programs, and the network's larger inputs, want some too
_NO_TRY = 0.1  # of what is free, below which an estimate needs no proof


def settle(
    config: RunConfig, objective: Objective, device: torch.device, autocast: torch.dtype | None, world: World
) -> int:
    """The largest divisor of a rank's share of the batch that fits in half of what is free; called by every rank.

    Raises:
        OutOfMemory: not even one image fits.
    """
    share = len(world.share(config.batch_size))
    # Every rank must come to the same, and what is free may differ: the one with the least decides.
    free = min(world.gather_values(free_bytes(device, world.num_here)))
    an_image = ACTIVATIONS * saved_bytes(objective, device, autocast)
    rest = state_bytes(config, objective)
    found = next((m for m in _divisors(share) if rest + m * an_image <= _SHARE * free), 1)
    while rest + found * an_image > _NO_TRY * free:
        trouble = _try(objective, found, device, autocast) if rest + found * an_image < free else "an estimate"
        if not any(world.any_rank(bool(trouble))):
            break
        smaller = [m for m in _divisors(share) if m < found]
        if not smaller:
            need = f"about {_gib(rest + an_image)} for one image at once, and {_gib(free)} are free"
            raise OutOfMemory("before the first step", need, "a smaller backbone= or dataset.image_size=")
        found = smaller[0]
    if found < share and world.is_main:
        say(f"micro_batch={found}: of {share} images a step, so many at once fit in half of the {_gib(free)} free")
    return found


def check_fits(
    config: RunConfig, objective: Objective, device: torch.device, autocast: torch.dtype | None, world: World
) -> None:
    """Refuse to go on with a run whose micro-batch was settled where more memory was free. Raises OutOfMemory."""
    share = len(world.share(config.batch_size))
    at_once = config.micro_batch if isinstance(config.micro_batch, int) else share
    free = min(world.gather_values(free_bytes(device, world.num_here)))
    need = state_bytes(config, objective) + at_once * ACTIVATIONS * saved_bytes(objective, device, autocast)
    if need > free:
        smaller = [m for m in _divisors(share) if m < at_once]
        fix = f"micro_batch={smaller[0]} or less" if smaller else "a machine with more"
        what = f"about {_gib(need)} for {at_once} images at once, and {_gib(free)} are free"
        raise OutOfMemory("before the first step", what, fix)


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


def _try(objective: Objective, num: int, device: torch.device, autocast: torch.dtype | None) -> str:
    """What was lacking in a step's passes on so many images; "" where nothing was. Nothing remains of them."""
    trouble = ""
    try:
        _loss(objective, num, device, autocast).backward()
    except Exception as error:
        needed = needed_memory(error)
        if needed is None:
            raise
        trouble = needed
    for parameter in objective.parameters():
        parameter.grad = None
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return trouble


def _divisors(share: int) -> Iterator[int]:
    """Of a rank's images a step, the largest first."""
    return (m for m in range(share, 0, -1) if share % m == 0)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
