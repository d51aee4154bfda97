"""What cm-train does with one composed config: the teacher made ready, what it passes on taken over, the run trained.

Torch is imported once a config is there: before that a command answers at once.
"""

import os
import time
from typing import TYPE_CHECKING

from ..core.errors import ExitCode
from ..core.signals import StopFlag
from ..core.terminal import in_parts
from .surroundings import NOTHING_AROUND, Surroundings

if TYPE_CHECKING:
    from ..training.config import RunConfig
    from .config import Composed
    from .lifecycle import Claim
    from .machine import Execute, Machine, Measure

_STARTED = time.monotonic()
SWEPT = "CM_TRAIN_SWEPT"  # how the ranks of a job on several nodes hear of the keys that its sweep sets differently


def train(
    composed: "Composed", stop: StopFlag, started: float = _STARTED, around: Surroundings = NOTHING_AROUND
) -> ExitCode:
    """The command, once its config is composed; its exit code.

    Args:
        started: what max_hours counts from, as time.monotonic() counts.
    """
    from ..core.world import is_launched
    from .execution import check_launched, execute, execute_under_torchrun, measured, num_ranks
    from .machine import Machine
    from .rank import heed_parent

    limit = composed.config.max_hours
    stop.deadline = None if limit is None else started + limit * 3600

    def spent_s() -> float:
        return time.monotonic() - started

    if is_launched():
        heed_parent(stop)
        swept = frozenset(os.environ.get(SWEPT, "").split())

        def plan(execute: "Execute", measure: "Measure") -> None:
            check_launched(composed.config, composed.is_sweep)
            world_size = int(os.environ["WORLD_SIZE"])
            train_in_order(composed, Machine(execute, measure, lambda run: world_size, spent_s), stop, swept)

        execute_under_torchrun(plan, stop)
    machine = Machine(
        lambda run: execute(run, stop, around),
        lambda run: around.remembered(run, lambda: measured(run, stop, around)),
        lambda run: num_ranks(run, around),
        spent_s,
    )
    finished = train_in_order(composed, machine, stop, around.swept)
    return ExitCode.DONE if finished else ExitCode.STOPPED


def train_in_order(composed: "Composed", machine: "Machine", stop: StopFlag, swept: frozenset[str]) -> bool:
    """The run, and before it the teacher that it needs and that isn't there; False where either was stopped early.

    With plan=true, what they would be and cost is said instead.
    """
    from ..core.memory import shortage_explained
    from ..core.signals import Stopped
    from ..core.terminal import say

    try:
        with shortage_explained("before the first step", "a machine with more, or a higher ulimit -v"):
            return _in_order(composed, machine, stop, swept)
    except Stopped:  # while the images were looked at
        say("stopped before the first step; the same command starts again")
        return False


def _in_order(composed: "Composed", machine: "Machine", stop: StopFlag, swept: frozenset[str]) -> bool:
    from .inheritance import begun_backbone
    from .lifecycle import claimed
    from .naming import named_for_its_pictures
    from .planning import show_plan
    from .teachers import find_again

    composed = named_for_its_pictures(composed)
    if composed.config.plan:
        return show_plan(composed, machine, swept)
    with claimed(composed.config.folder) as claim, in_parts():
        if claim.stored is None:
            config = _new(composed, machine, stop, swept)
            if config is None:
                return False
        else:
            config = _resumed(composed, claim, claim.stored, machine)
            config = claim.resumed(begun_backbone(config, claim.stored, composed.asked))
            if not claim.is_finished(config):
                config = find_again(config, claim.stored, claim.newest)
        return claim.train(config, machine.train)


def _new(composed: "Composed", machine: "Machine", stop: StopFlag, swept: frozenset[str]) -> "RunConfig | None":
    """The config of a run that begins: settled, with its teacher and what that passes on; None where stopped early."""
    from ..models.checkpoints import find
    from .budget import planned
    from .inheritance import inherit_backbone
    from .teachers import is_ready, ready_teacher

    composed = composed.settled()
    config = inherit_backbone(composed.config, composed.config.start, composed.asked)  # refused before anything trains
    teacher, was_ready = config.teacher, True
    if config.needs_teacher() and teacher is None:
        config.check_machine()  # now rather than after a teacher has trained
        if config.start is not None:
            find.resolve(config.start)  # likewise
        was_ready = is_ready(config.usual_teacher)
        teacher = ready_teacher(composed, machine, stop, swept)
        if teacher is None:
            return None

    def settled(images: int | None, like: "RunConfig | None" = None) -> "RunConfig":
        config = composed.settled(images=images, like=like).config.model_copy(update={"teacher": teacher})
        return inherit_backbone(config, config.teacher if config.start is None else config.start, composed.asked)

    is_shared = composed.is_sweep or not was_ready
    return planned(settled, machine, is_shared, composed.is_sweep)


def _resumed(composed: "Composed", claim: "Claim", stored: "RunConfig", machine: "Machine") -> "RunConfig":
    """The config of a run that goes on, with the numbers that were settled when it began."""
    from .budget import check_same_budget

    config = composed.settled(stored).config
    check_same_budget(config, stored, claim.folder)
    if config.budget is None and "steps" not in composed.asked:
        config = config.model_copy(update={"budget": stored.budget})
    if config.micro_batch == "auto" and isinstance(stored.micro_batch, int | None):
        share = config.batch_size // machine.num_ranks(config)
        if stored.micro_batch is None or share % stored.micro_batch == 0:  # else there are other ranks than there were
            config = config.model_copy(update={"micro_batch": stored.micro_batch})
    return config
