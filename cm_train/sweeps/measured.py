"""What the jobs of a sweep have measured of their runs, each distinct one once, so that equal runs are equally long."""

import dataclasses
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.files import not_through_a_link, write_whole
from ..core.signals import StopFlag

if TYPE_CHECKING:
    from ..runs.measuring import Measured
    from ..training.config import RunConfig

_FOLDER = "measured"
# What a step's time hangs on. How long a run is, and what it is called, is no part of it.
_COUNTS = frozenset(
    [
        *("mode", "batch_size", "micro_batch", "devices", "precision", "compile", "deterministic", "guidance", "init"),
        *("dataset", "backbone", "objective", "ema", "optimizer"),
    ]
)


def remembered(
    folder: Path, run: "RunConfig", measure: Callable[[], "Measured | None"], stop: StopFlag
) -> "Measured | None":
    """What an equal run of this sweep has measured, else what `measure` does now, alone; None where stopped.

    Args:
        folder: the sweep's.
    """
    from ..runs.measuring import Measured

    path = folder / _FOLDER / f"{_key(run)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock"), stop) as is_ours:
        if not is_ours:
            return None
        with suppress(OSError, ValueError, TypeError):
            return Measured(**json.loads(path.read_text()))
        found = measure()
        if found is not None:
            write_whole(path, json.dumps(dataclasses.asdict(found)).encode())
        return found


def measure_first(words: Sequence[str], keys: Sequence[str], grid: Sequence[str], folder: Path, stop: StopFlag) -> None:
    """Measure what the jobs of a grid will need, before the first of them begins. Raises InputError.

    Args:
        words: of the command line, key=value each.
        keys: that are swept.
        grid: what each job sets, as "seed=0 mode=cd".
    """
    from ..core.composing import composed_of
    from ..runs.config import Composed
    from ..runs.execution import measured
    from ..runs.forecast import forecasts
    from ..runs.machine import Machine
    from ..runs.surroundings import Surroundings

    around = Surroundings(frozenset(keys), own_process=True, shares_machine=True)

    def measure(run: "RunConfig") -> "Measured | None":
        return remembered(folder, run, lambda: measured(run, stop, around), stop)

    kept = [word for word in words if word.split("=")[0] not in keys]
    for settings in grid:
        with composed_of([*kept, *settings.split(" ")]) as cfg:
            composed = Composed.of(cfg, in_sweep=True)
            if composed.config.budget is None or stop():
                continue
            forecasts(composed.settled(), Machine(lambda run: False, measure), frozenset(keys))


def _key(run: "RunConfig") -> str:
    from ..runs.plan import without_length
    from ..training.config import dump

    values = {key: value for key, value in without_length(dump(run)).items() if key in _COUNTS}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def _alone(path: Path, stop: StopFlag) -> Iterator[bool]:
    """Whether no other job measures meanwhile; False where the wait for that was stopped."""
    with open(path, "w", opener=not_through_a_link) as file:
        while not stop():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(0.2)
                continue
            yield True
            return
        yield False
