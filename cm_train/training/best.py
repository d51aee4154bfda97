"""Which checkpoint of a run is the best, by the numbers that it has logged of its images: what `keep=best` keeps."""

from typing import NamedTuple

from ..core import registry
from ..core.errors import InputError
from ..core.run_layout import METRICS, step_of
from ..models.checkpoints import read as checkpoint
from .config import PREFIX, RunConfig
from .tracking.metrics_file import values_of


class Best(NamedTuple):
    """A checkpoint's step, and its number."""

    step: int
    value: float


def best_checkpoint(config: RunConfig, before: int | None = None) -> Best | None:
    """The best of those that are there, the first of equal ones; None where none of them has been measured.

    Args:
        before: a step that does not count, nor any later one.
    """
    there = {step_of(folder.name) for folder in checkpoint.folders(config.folder)}
    best: Best | None = None
    for step, value in values_of(config.folder / METRICS, f"{PREFIX}{chosen_number(config)}"):
        one = Best(step, value)
        if step in there and (before is None or step < before) and (best is None or is_better(config, one, best)):
            best = one
    return best


def is_better(config: RunConfig, one: Best, other: Best) -> bool:
    """Whether one number is better than another, as its metric says."""
    name = chosen_number(config)
    classes = [registry.component(metric) for metric in config.metrics.values()]
    is_lower_better = next(cls.numbers[name] for cls in classes if name in cls.numbers) == "lower"
    return one.value < other.value if is_lower_better else one.value > other.value


def chosen_number(config: RunConfig) -> str:
    """What `keep=best` goes by: the number that `objective_metric` names, else the first metric's first.

    Raises:
        InputError: `objective_metric` is a number of none of the metrics.
    """
    known: list[str] = [name for metric in config.metrics.values() for name in registry.component(metric).numbers]
    asked = config.objective_metric or ""
    if not asked.startswith(PREFIX):
        return known[0]
    if asked.removeprefix(PREFIX) not in known:
        allowed = ", ".join(f"{PREFIX}{name}" for name in known)
        raise InputError("objective_metric is a number of none of the metrics", asked, allowed, "metrics=[...]")
    return asked.removeprefix(PREFIX)
