"""What is around a run while it trains: nothing, or the other jobs of its sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.signals import StopFlag

if TYPE_CHECKING:
    from ..training.config import RunConfig
    from .measuring import Measured

    Measuring = Callable[[], Measured | None]


@dataclass(frozen=True)
class Surroundings:
    """What is around a run: nothing where a command trains one, else what its sweep says.

    Attributes:
        swept: the keys that the jobs of a sweep set differently.
        own_process: whether it trains in a process of its own even where one is enough, since a job that is killed must
            not take the others along.
        shares_machine: whether other jobs train on this machine meanwhile, so that devices=auto is one.
        remembered: called with a run's config and what measures it; what that measures, or what an equal run of the
            sweep has measured.
        reserved: called with a number of devices and what ends the wait for them; a context that holds them, and yields
            whether they were to be had.
    """

    swept: frozenset[str] = frozenset()
    own_process: bool = False
    shares_machine: bool = False
    remembered: Callable[[RunConfig, Measuring], Measured | None] = lambda run, measure: measure()
    reserved: Callable[[int, StopFlag], AbstractContextManager[bool]] = lambda num, stop: contextlib.nullcontext(True)


NOTHING_AROUND = Surroundings()
