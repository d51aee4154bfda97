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
    from .config import Composed
    from .lifecycle import Execute

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
    from .execution import check_launched, execute, execute_under_torchrun
    from .rank import heed_parent

    limit = composed.config.max_hours
    stop.deadline = None if limit is None else started + limit * 3600
    if is_launched():
        heed_parent(stop)
        swept = frozenset(os.environ.get(SWEPT, "").split())

        def plan(execute: "Execute") -> None:
            check_launched(composed.config, composed.is_sweep)
            train_in_order(composed, execute, stop, swept)

        execute_under_torchrun(plan, stop)
    finished = train_in_order(composed, lambda run: execute(run, stop, around), stop, around.swept)
    return ExitCode.DONE if finished else ExitCode.STOPPED


def train_in_order(composed: "Composed", execute: "Execute", stop: StopFlag, swept: frozenset[str]) -> bool:
    """The run, and before it the teacher that it needs and that isn't there; False where either was stopped early."""
    from ..models.checkpoints import read as checkpoint
    from .inheritance import begun_backbone, inherit_backbone
    from .lifecycle import claimed
    from .teachers import find_again, ready_teacher

    config = composed.config
    with claimed(config.folder) as claim, in_parts():
        if claim.stored is None:
            config = inherit_backbone(config, config.start, composed.asked)
            if config.needs_teacher() and config.teacher is None:
                config.check_machine()  # now rather than after a teacher has trained
                if config.start is not None:
                    checkpoint.resolve(config.start)  # likewise
                teacher = ready_teacher(composed, execute, stop, swept)
                if teacher is None:
                    return False
                config = config.model_copy(update={"teacher": teacher})
            if config.start is None:
                config = inherit_backbone(config, config.teacher, composed.asked)
        else:
            config = claim.resumed(begun_backbone(config, claim.stored, composed.asked))
            if not claim.is_finished(config):
                config = find_again(config, claim.stored, claim.newest)
        return claim.train(config, execute)
