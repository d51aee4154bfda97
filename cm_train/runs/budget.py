"""How many steps a budget comes to: measured once, when a run begins, and kept."""

from collections.abc import Callable
from pathlib import Path

from ..core.errors import InputError
from ..core.terminal import say
from ..training.budget import Budget
from ..training.config import RunConfig
from .machine import Machine
from .measuring import Measured

_LEAST = 0.1  # of its share that a student has in any case, however long its teacher took


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


def planned(
    settled: Callable[[int | None], RunConfig], machine: Machine, is_shared: bool, is_sweep: bool
) -> RunConfig | None:
    """The config of a new run, as long as its budget says; None where measuring was stopped.

    Args:
        settled: its config for so many images; None: where no budget says how many.
        is_shared: whether its teacher has had a part of the budget, or would have.
        is_sweep: whether the jobs of a sweep shall come to the same: then what one has spent before does not count.
    """
    config = settled(None)
    own, _ = parts_of(config, is_shared)
    if own is None:
        return config
    if own.unit == "s" and not is_sweep:
        whole = Budget.parse("budget", config.budget or "")
        own = Budget(max(whole.amount - machine.spent_s(), _LEAST * own.amount), "s")
    return as_long_as(own, settled, machine)


def as_long_as(budget: Budget, settled: Callable[[int | None], RunConfig], machine: Machine) -> RunConfig | None:
    """The config of a run that takes so long, or so many images; None where measuring was stopped."""
    if budget.unit == "images":
        return settled(round(budget.amount))
    tried = settled(None)
    found = within(budget, tried, settled, machine)
    if found is None:
        return None
    config, measured = found
    if config.micro_batch == "auto":
        config = config.model_copy(update={"micro_batch": measured.micro_batch})
    images = config.steps * config.batch_size
    say(f"{budget} at {measured.step_s:.3g} s a step: {config.steps:,} steps, {images:,} images")
    return config


def within(
    budget: Budget, tried: RunConfig, settled: Callable[[int | None], RunConfig], machine: Machine
) -> tuple[RunConfig, Measured] | None:
    """The config of a run that takes so long, and what it takes; None where measuring was stopped.

    Args:
        tried: a config to begin with; short runs have smaller batches, and those are measured then.
    """
    measured = machine.measure(tried)
    if measured is None:
        return None
    config = settled(measured.images_within(budget.amount, settled, tried.batch_size))
    if config.batch_size != tried.batch_size:
        measured = machine.measure(config)
        if measured is None:
            return None
        config = settled(measured.images_within(budget.amount, settled, config.batch_size))
    return config, measured


def check_same_budget(config: RunConfig, stored: RunConfig, folder: Path) -> None:
    """Refuse another budget than the one that a run's steps were settled by. Raises InputError."""
    if config.budget not in (None, stored.budget):
        what = f"{folder} began with {f'budget={stored.budget}' if stored.budget else 'no budget'}"
        fix = f"steps=... in place of budget (now {stored.steps}), or name=... for a run of its own"
        raise InputError(what, f"budget={config.budget}", stored.budget or "none", fix)
