"""How many steps a budget comes to: measured once, when a run begins, and kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..core.errors import InputError
from ..core.terminal import say
from ..training.budget import Budget
from ..training.config import RunConfig
from .machine import Machine
from .measuring import Measured

_LEAST = 0.3  # of a budget that is left for a run in any case, however long what came before it took


class Settled(Protocol):
    """A run's config for so many images, of a network and batches that were measured."""

    def __call__(self, images: int | None, like: RunConfig | None = None) -> RunConfig:
        """Args: images: None where no budget says how many; like: see `plan.settle`."""


def parts_of(config: RunConfig, is_shared: bool) -> tuple[Budget | None, Budget | None]:
    """What a run may take itself, and its teacher; None where no budget says so.

    Args:
        is_shared: whether a part is set aside for a teacher.
    """
    budgets = config.budgets()
    if budgets is None:
        return None, None
    whole, part = budgets
    return (whole.less(part), part) if is_shared and config.needs_teacher() else (whole, None)


def planned(settled: Settled, machine: Machine, is_shared: bool, is_sweep: bool) -> RunConfig | None:
    """The config of a new run, as long as its budget says; None where measuring was stopped.

    Args:
        is_shared: whether its teacher has had a part of the budget, or would have.
        is_sweep: whether the jobs of a sweep shall come to the same: then what one has spent before does not count.
    """
    config = settled(None)
    own, _ = parts_of(config, is_shared)
    if own is None or is_sweep:
        return config if own is None else as_long_as(own, settled, machine, lambda: 0.0)
    whole = Budget.parse("budget", config.budget or "")
    return as_long_as(whole if own.unit == "s" else own, settled, machine, machine.spent_s)


def as_long_as(budget: Budget, settled: Settled, machine: Machine, spent_s: Callable[[], float]) -> RunConfig | None:
    """The config of a run that takes so long, or so many images; None where measuring was stopped.

    Args:
        spent_s: how much of a time is gone already; asked once it was measured what a step takes.
    """
    if budget.unit == "images":
        return settled(round(budget.amount))
    found = within(budget, settled(None), settled, machine, spent_s)
    if found is None:
        return None
    config, measured = found
    if config.micro_batch == "auto":
        config = config.model_copy(update={"micro_batch": measured.micro_batch})
    say(f"at {measured.step_s:.3g} s a step {budget} come to {config.steps:,} steps of {config.batch_size} images")
    return config


def within(
    budget: Budget, tried: RunConfig, settled: Settled, machine: Machine, spent_s: Callable[[], float]
) -> tuple[RunConfig, Measured] | None:
    """The config of a run that takes so long, and what it takes; None where measuring was stopped.

    Args:
        tried: a config to begin with; short runs have smaller batches and networks, and those are measured then.
        spent_s: see `as_long_as`.
    """

    def left_s() -> float:
        return max(budget.amount - spent_s(), _LEAST * budget.amount)

    measured = machine.measure(tried)
    if measured is None:
        return None
    config = settled(measured.images_within(left_s(), settled, tried))
    if (config.batch_size, config.backbone) != (tried.batch_size, tried.backbone):
        tried = config
        measured = machine.measure(tried)
        if measured is None:
            return None
        config = settled(measured.images_within(left_s(), settled, tried), tried)
    return config, measured


def check_same_budget(config: RunConfig, stored: RunConfig, folder: Path) -> None:
    """Refuse another budget than the one that a run's steps were settled by. Raises InputError."""
    if config.budget not in (None, stored.budget):
        what = f"{folder} began with {f'budget={stored.budget}' if stored.budget else 'no budget'}"
        fix = f"steps=... in place of budget (now {stored.steps}), or name=... for a run of its own"
        raise InputError(what, f"budget={config.budget}", stored.budget or "none", fix)
