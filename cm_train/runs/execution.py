"""Where a run trains: in this process, in ranks of its own on this machine, or in those that torchrun has started."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NoReturn

from ..core.errors import ExitCode, InputError, TrainingFailed
from ..core.settings import typed
from ..core.signals import StopFlag
from ..core.terminal import hushed, say
from ..core.world import World
from ..models.checkpoints import read as checkpoint
from ..training.config import RunConfig, dump
from . import launch as launching
from . import worker
from .build import check_divides
from .machine import Execute, Measure
from .measuring import Measured, measure, on_trial, read_result
from .rank import as_rank, tell
from .stored import store_config
from .surroundings import Surroundings


def execute(config: RunConfig, stop: StopFlag, around: Surroundings) -> bool:
    """Train a run whose config lies in its folder: here where one process does it, else in ranks of its own.

    Returns:
        False where it was stopped early.
    """
    num = num_ranks(config, around)
    if num == 1 and not around.own_process:
        return worker.run(config, stop)
    if not _in_ranks(num, "cm_train.runs.worker", config, stop, around, lambda: _kept(config)):
        return False
    newest = checkpoint.newest_manifest(config.folder)
    return newest is not None and newest.step >= config.steps


def measured(config: RunConfig, stop: StopFlag, around: Surroundings) -> Measured | None:
    """What a run takes where `execute` would train it; None where that was stopped."""
    num = num_ranks(config, around)
    say("measuring what a step takes")
    with on_trial(config) as trial, hushed():
        if num == 1 and not around.own_process:
            return measure(trial, stop)
        store_config(trial.folder, dump(trial))
        in_time = _in_ranks(num, "cm_train.runs.measuring", trial, stop, around, lambda: "nothing was begun")
        return read_result(trial.folder) if in_time else None


def num_ranks(config: RunConfig, around: Surroundings) -> int:
    """The processes by which `execute` trains a run. Raises InputError where they can't share its batches."""
    num = 1 if around.shares_machine and config.devices == "auto" else launching.num_ranks(config.devices)
    check_divides(config, num)
    return num


def _in_ranks(
    num: int, module: str, config: RunConfig, stop: StopFlag, around: Surroundings, kept: Callable[[], str]
) -> bool:
    """Have ranks of their own do what `module` does with a config that lies in its folder; False without devices.

    Args:
        kept: what there is to go on from where they break off.
    """
    with around.reserved(num, stop) as free:
        if not free:
            return False
        ended = launching.launch(num, module, str(config.folder), stop)
    if ended.code == ExitCode.WRONG_INPUT:
        raise InputError(ended.words)
    if ended.code != ExitCode.DONE:
        raise TrainingFailed(ended.words if ended.says_all else f"{ended.words or 'a rank failed'}; {kept()}")
    return True


def _kept(config: RunConfig) -> str:
    """What a run that has broken off can go on from."""
    try:
        newest = checkpoint.newest_manifest(config.folder)
    except InputError:
        return "what was saved can't be seen now"
    return "nothing was saved yet" if newest is None else f"the same command goes on from step {newest.step}"


def execute_under_torchrun(plan: Callable[[Execute, Measure], object], stop: StopFlag) -> NoReturn:
    """Be one of torchrun's ranks, and end with its exit code: rank 0 plans, and each run is trained by all of them.

    Args:
        plan: called on rank 0, with what trains and what measures a run; the teacher's comes before its student's.
    """

    def lead(world: World) -> int:
        def send_and_run(run: RunConfig) -> bool:
            world.broadcast(("run", dump(run)))
            return worker.run(run, stop, world)

        def send_and_measure(run: RunConfig) -> Measured | None:
            with on_trial(run) as trial:
                world.broadcast(("measure", dump(trial)))
                return measure(trial, stop, world)

        code = ExitCode.DONE
        try:
            plan(send_and_run, send_and_measure)
        except InputError as error:
            tell(str(error), says_all=True)
            code = ExitCode.WRONG_INPUT
        world.broadcast(("end", code))
        # Stopped is done here: torchrun may start a job again that failed, and this one was asked to stop.
        return code

    def follow(world: World) -> int:
        order: tuple[str, Any]
        while (order := world.broadcast(None))[0] != "end":
            with contextlib.suppress(InputError):  # rank 0 meets the same one, and says it
                work = worker.run if order[0] == "run" else measure
                work(typed(RunConfig, order[1]), stop, world)
        return int(order[1])

    as_rank(lambda world: (lead if world.is_main else follow)(world))


def check_launched(config: RunConfig, is_sweep: bool) -> None:
    """Refuse what can't be done under torchrun. Raises InputError."""
    if is_sweep:
        raise InputError("a sweep can't run under torchrun", "-m", fix="cm-train -m devices=..., without torchrun")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if config.devices not in ("auto", ranks):
        raise InputError("devices and torchrun disagree", f"{config.devices} and {ranks}", fix="drop devices=")
