"""Checkpoint folders that a run removes while somebody else reads them: noticed, and looked for again."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from ...core.errors import InputError
from ...core.files import is_there

P = ParamSpec("P")
T = TypeVar("T")

_TRIES = 10
_PAUSE_S = 0.05


class Vanished(InputError):
    """A checkpoint folder was there when somebody looked, and was removed before it was read: it is not damaged."""

    def __init__(self, folder: Path):
        fix = "the same command again; a larger keep=... where its run saves faster than one can read"
        super().__init__(f"checkpoint {folder} was removed while it was read", fix=fix)


@contextlib.contextmanager
def present(folder: Path) -> Iterator[None]:
    """Around reading a checkpoint: whatever goes wrong is `Vanished` where its folder is not there any more."""
    try:
        yield
    except Exception:
        there = True
        with contextlib.suppress(OSError):  # where that can't be told, what went wrong says more
            there = is_there(folder)
        if there:
            raise
        raise Vanished(folder) from None


def again(look: Callable[P, T]) -> Callable[P, T]:
    """Decorator: `look`, which begins at the run's folder, is called again where what it found has vanished.

    A run that keeps few checkpoints removes the older ones only once there is a newer one, so there is one to find.
    """

    @functools.wraps(look)
    def looking(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(_TRIES - 1):
            with contextlib.suppress(Vanished):
                return look(*args, **kwargs)
            time.sleep(_PAUSE_S)
        return look(*args, **kwargs)

    return looking
