"""What the environment says of this process: that it is one of the ranks that a launcher started, or alone."""

import os
from contextlib import suppress
from dataclasses import dataclass

from .errors import InputError

# A rank that is silent for this long is taken for hung, and the job ends; CM_TRAIN_PATIENCE_S overrides it.
PATIENCE_S = 1800.0
STORE = "CM_TRAIN_STORE"  # the file where ranks of one machine meet
_RANK = ("RANK", "WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # where ranks meet that have no such file
_LONGEST_S = 1e8


@dataclass(frozen=True)
class Place:
    """This process among the ranks of one run, `local_...` among those of its machine."""

    rank: int
    size: int
    local_rank: int
    patience_s: float


def place() -> Place | None:
    """What a launcher (ours, torchrun or a cluster's) has made of this process; None where there is none.

    Raises:
        InputError: half a rank, or an impossible one, as what an earlier job left in a shell or an image: the others
            would be waited for in vain.
    """
    claims = _set("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not claims:
        return None
    needed = _RANK if STORE in os.environ else _RANK + _ADDRESS
    missing = [name for name in needed if not os.environ.get(name)]
    fix = f"unset {' '.join(claims)}, or start with torchrun"
    if missing:
        got = f"{_shown(claims)} without {', '.join(missing)}"
        raise InputError("the environment makes this process a rank, but only by half", got, fix=fix)
    rank, size, local_rank = (_number(name, fix) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = _number("LOCAL_WORLD_SIZE", fix) if "LOCAL_WORLD_SIZE" in os.environ else size
    if not (rank < size and local_rank < local_size <= size):
        got = _shown(_set("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        raise InputError("the environment makes this process a rank that can't be", got, "0 to WORLD_SIZE - 1", fix)
    if STORE not in os.environ and not 0 < _number("MASTER_PORT", fix) < 65536:
        raise InputError("MASTER_PORT is no port", os.environ["MASTER_PORT"], "1 to 65535", fix)
    return Place(rank, size, local_rank, patience_s())


def is_rank() -> bool:
    """Whether a launcher has made this process a rank; False where what the environment says makes no sense."""
    with suppress(InputError):
        return place() is not None
    return False


def is_follower() -> bool:
    """Whether this is a rank other than 0, which leaves it to that one to show anything."""
    with suppress(InputError):
        here = place()
        return here is not None and here.rank > 0
    return False


def patience_s() -> float:
    """How long ranks wait for each other. Raises InputError."""
    given = os.environ.get("CM_TRAIN_PATIENCE_S") or str(PATIENCE_S)
    with suppress(ValueError):
        if 0 < (seconds := float(given)) <= _LONGEST_S:
            return seconds
    raise InputError("CM_TRAIN_PATIENCE_S is no number of seconds", given, f"above 0, at most {_LONGEST_S:g}")


def _set(*names: str) -> list[str]:
    return [name for name in names if name in os.environ]


def _shown(names: list[str]) -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in names)


def _number(name: str, fix: str) -> int:
    """Raises InputError."""
    given = os.environ.get(name, "0").strip()
    if not (given.isascii() and given.isdecimal() and len(given) < 10):
        raise InputError(f"{name} must be a number", given, fix=fix)
    return int(given)
