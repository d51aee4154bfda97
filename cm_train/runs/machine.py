"""What makes runs, wherever they train: given to whoever decides which ones."""

from collections.abc import Callable
from dataclasses import dataclass

from ..training.config import RunConfig
from .measuring import Measured

Execute = Callable[[RunConfig], bool]  # trains the run whose config lies in its folder; False where stopped early
Measure = Callable[[RunConfig], Measured | None]  # makes a few of its steps and forgets them; None where stopped


@dataclass(frozen=True)
class Machine:
    """Trains runs, and measures what one would take.

    Attributes:
        train: see `Execute`.
        measure: see `Measure`.
        num_ranks: the processes that a run would be trained by.
        spent_s: how long the command has been at it.
    """

    train: Execute
    measure: Measure
    num_ranks: Callable[[RunConfig], int] = lambda config: 1
    spent_s: Callable[[], float] = lambda: 0.0
