"""The teacher of a student: the one that it is given, found again, or trained before it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import InputError, TrainingFailed
from ..core.signals import StopFlag
from ..core.terminal import begin_part, say
from ..models.checkpoints import find
from ..models.checkpoints import read as checkpoint
from ..models.checkpoints.manifest import Manifest
from ..training.config import RunConfig
from ..training.tracking import OF_ONE_RUN
from .budget import as_long_as
from .config import Composed
from .lifecycle import run_one
from .lock import FolderInUse
from .machine import Machine
from .read_back import read_back


def ready_teacher(composed: Composed, machine: Machine, stop: StopFlag, swept: frozenset[str]) -> str | None:
    """Where the usual teacher of a run is, trained first where it is missing or unfinished: within `in_parts`.

    Args:
        swept: keys in which the jobs of a sweep differ, so that they can't decide anything about their teacher.

    Returns:
        None where its training was stopped.

    Raises:
        InputError: what is there is of other data.
        TrainingFailed: it can't be trained.
    """
    student, home = composed.config, composed.config.usual_teacher
    if home.resolve() == student.folder.resolve():
        raise InputError(f"{home} can't be its own teacher", fix="set teacher=..., or init=random")
    is_said = False
    while not is_ready(home):
        try:
            if not is_said:
                say(f"no finished teacher in {home}: training it first (teacher=... names another)")
            teacher = _next_config(composed, home, swept, machine)
            if teacher is None:
                return None
            begin_part("1 of 2: the teacher")
            with without_variables_of_one_run():
                if not run_one(teacher, machine.train):
                    return None
            begin_part("2 of 2")
            break
        except FolderInUse as error:  # most likely another job of this sweep, which needs the same teacher
            if not is_said:
                say(f"waiting for the teacher: {error.situation}")
            if stop():
                return None
            time.sleep(1)
        except TrainingFailed as error:
            raise TrainingFailed(f"the teacher in {home}: {error}") from None
        is_said = True
    _check_same_data(student, read_back(home), home)
    return str(home)


def is_ready(home: Path) -> bool:
    """Whether the run in `home` is as long as it shall be; its `steps` may have been lowered to what it had."""
    newest = checkpoint.newest_manifest(home)
    return newest is not None and (newest.finished or newest.step >= read_back(home).steps)


def _next_config(composed: Composed, home: Path, swept: frozenset[str], machine: Machine) -> RunConfig | None:
    """What the teacher in `home` is trained with: once begun, its own settings, whatever they were.

    None where what it takes was to be measured, and that was stopped.
    """
    student = composed.config
    if checkpoint.newest_manifest(home) is None:
        budgets = student.budgets()
        if budgets is None:
            return composed.teacher(home, swept)
        spent_s = machine.spent_s if not composed.is_sweep else lambda: 0.0
        return as_long_as(
            budgets[1], lambda images, like=None: composed.teacher(home, swept, images, like), machine, spent_s
        )
    teacher = read_back(home)
    _check_same_data(student, teacher, home)
    # Where its curves go is this command's to say: a stored tracker must not put private pictures online unasked.
    tracking = student.tracking.model_copy(update={"tags": teacher.tracking.tags})
    dataset = teacher.dataset.at(student.dataset.place)
    where = {"name": home.name, "run_dir": str(home)}
    return teacher.model_copy(update={**where, "dataset": dataset, "tracking": tracking})


@contextmanager
def without_variables_of_one_run() -> Iterator[None]:
    """While a teacher trains: of the runs of this command, wandb's variables and an agent of its mean the student."""
    hidden = {key: os.environ.pop(key) for key in OF_ONE_RUN if key in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _check_same_data(student: RunConfig, teacher: RunConfig, home: Path) -> None:
    """Refuse a teacher of other data as far as settings tell; whether the images are the same, fingerprints say later.

    So they do where other ones of the same images are held out.

    Raises:
        InputError: it is one.
    """
    if student.dataset.whole().identity() != teacher.dataset.whole().identity():
        raise InputError(
            f"the teacher in {home} was trained on other data: {teacher.dataset.model_dump()}",
            fix="set teacher=..., or run_dir=... in a folder of its own",
        )


def find_again(config: RunConfig, stored: RunConfig, newest: Manifest | None) -> RunConfig:
    """The config of a run that has begun and goes on, with the teacher that it began with, wherever that is now.

    Args:
        stored: its config as it was.
        newest: its newest checkpoint, which knows the teacher by its hash.

    Raises:
        InputError: the teacher is not there, and the loss needs it or `teacher=` names it.
    """
    known = None if newest is None else newest.provenance.get("teacher")
    if not config.needs_teacher() or known is None:
        return config.model_copy(update={"teacher": config.teacher or stored.teacher})
    usual = [str(config.usual_teacher), *filter(None, [stored.teacher])]
    places = list(dict.fromkeys(usual)) if config.teacher is None else [config.teacher]
    damaged = ""
    for place in places:
        try:
            find.resolve_known(place, known)
            return config.model_copy(update={"teacher": place})
        except checkpoint.NotThere:
            pass
        except checkpoint.DamagedCheckpoint as error:
            damaged = damaged or f": {error}"
    gone = f"the teacher that {config.folder} began with is not in {' nor in '.join(places)}{damaged}"
    if config.objective.needs_teacher() or config.teacher is not None:
        fix = "bring it back, or name the place where it is now with teacher=..."
        raise InputError(gone, allowed=f"averaged weights with the sha256 {known[:16]}...", fix=fix)
    say(f"note: {gone}; it gave the first weights, and how well the student agrees with it is no longer measured")
    return config
