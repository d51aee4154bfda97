"""One run, from a composed config to a trained run folder: new or resumed, here, in ranks, or as one under torchrun."""

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ..core import cli
from ..core.run_layout import CHECKPOINTS, SNAPSHOTS
from ..core.signals import StopFlag

_STARTED = time.monotonic()
SWEPT = "CM_TRAIN_SWEPT"  # how the ranks of a job on several nodes hear of the keys that its sweep sets differently


@dataclass(frozen=True)
class Surroundings:
    """What is around a run: nothing where a command trains one, else what its sweep says.

    Attributes:
        swept: the keys that the jobs of a sweep set differently.
        own_process: whether it trains in a process of its own even where one is enough, since a job that is killed must
            not take the others along.
        shares_machine: whether other jobs train on this machine meanwhile, so that devices=auto is one.
        reserved: called with a number of devices and what ends the wait for them; a context that holds them, and yields
            whether they were to be had.
    """

    swept: frozenset[str] = frozenset()
    own_process: bool = False
    shares_machine: bool = False
    reserved: Callable[[int, StopFlag], AbstractContextManager[bool]] = lambda num, stop: contextlib.nullcontext(True)


def train(cfg: DictConfig, stop: StopFlag, started: float = _STARTED, around: Surroundings = Surroundings()) -> int:
    """The command on one composed config; its exit code.

    Args:
        started: what max_hours counts from, as time.monotonic() counts.
    """
    from ..core.world import is_launched
    from .config import parse  # torch is imported from here on
    from .rank import heed_parent

    config = parse(cfg)
    stop.deadline = None if config.max_hours is None else started + config.max_hours * 3600
    if is_launched():
        heed_parent(stop)
        _train_as_rank(config, cfg, stop, frozenset(os.environ.get(SWEPT, "").split()))
    finished = _train(config, cfg, lambda run: _execute(run, stop, around), stop, around.swept)
    return cli.DONE if finished else cli.STOPPED


def _train_as_rank(config: Any, cfg: DictConfig, stop: StopFlag, swept: frozenset[str]) -> NoReturn:
    """Under torchrun: rank 0 plans as the command does alone, and the others run what it sends them."""
    from ..core import registry
    from ..core.errors import InputError
    from ..training.config import RunConfig, dump
    from . import worker
    from .rank import as_rank, tell

    def lead(world: Any) -> int:
        def send_and_run(run: Any) -> bool:
            world.from_main(("run", dump(run)))
            return worker.run(run, stop, world)

        code = cli.DONE
        try:
            _check_launched(config)
            _train(config, cfg, send_and_run, stop, swept)
        except InputError as error:
            tell(str(error))
            code = cli.WRONG_INPUT
        world.from_main(("end", code))
        # Stopped is done here: torchrun may start a job again that failed, and this one was asked to stop.
        return code

    def follow(world: Any) -> int:
        while (order := world.from_main(None))[0] == "run":
            with contextlib.suppress(InputError):  # rank 0 meets the same one, and says it
                worker.run(registry.typed(RunConfig, order[1]), stop, world)
        return int(order[1])

    as_rank(lambda world: (lead if world.is_main else follow)(world))


def _check_launched(config: Any) -> None:
    from ..core.errors import InputError

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise InputError("a sweep can't run under torchrun", "-m", fix="cm-train -m devices=..., without torchrun")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if config.devices not in ("auto", ranks):
        raise InputError("devices and torchrun disagree", f"{config.devices} and {ranks}", fix="drop devices=")


def _execute(config: Any, stop: StopFlag, around: Surroundings) -> bool:
    """Train a run whose config lies in its folder: here where one process does it, else in ranks of its own."""
    from ..core.errors import InputError, TrainingFailed
    from ..models.checkpoints import read as checkpoint
    from . import launch as launching
    from . import worker
    from .build import check_divides

    num = 1 if around.shares_machine and config.devices == "auto" else launching.num_ranks(config.devices)
    check_divides(config, num)
    if num == 1 and not around.own_process:
        return worker.run(config, stop)
    with around.reserved(num, stop) as free:
        if not free:
            return False
        code, words = launching.launch(num, "cm_train.runs.worker", str(config.folder), stop)
    if code == cli.WRONG_INPUT:
        raise InputError(words)
    if code != cli.DONE:
        kept = "what was saved can't be seen now"
        with contextlib.suppress(InputError):
            newest = checkpoint.newest_manifest(config.folder)
            kept = "nothing was saved yet" if newest is None else f"the same command goes on from step {newest.step}"
        raise TrainingFailed(words if "; fix: " in words else f"{words or 'a rank failed'}; {kept}")
    newest = checkpoint.newest_manifest(config.folder)
    return newest is not None and newest.step >= config.steps


def _train(
    config: Any,
    cfg: DictConfig,
    execute: Callable[[Any], bool],
    stop: StopFlag,
    swept: frozenset[str] = frozenset(),
) -> bool:
    """Train the run of `config`, new or resumed; False where it was stopped early."""
    from ..core.terminal import say
    from ..models.checkpoints import read as checkpoint
    from ..models.checkpoints import write as saving
    from ..training.config import dump
    from . import announce
    from .config import complete, read_back
    from .lock import check_ours, lock
    from .stored import check_same_run, store_config
    from .teachers import as_it_began, find_again, inherit

    check_ours(Path(os.path.normpath(config.folder)))
    with lock(config.folder):
        check_ours(config.folder)  # again: x/../y may be another folder once x is there
        for part in (CHECKPOINTS, SNAPSHOTS):
            saving.remove_unfinished(config.folder / part)
        newest, stored = checkpoint.newest_manifest(config.folder), None
        if newest is None:  # nothing to lose yet: a mistaken first command may be corrected
            if config.start is not None:
                checkpoint.resolve(config.start)  # now rather than after a teacher has trained
            config.check_machine()
            config = inherit(config, cfg, lambda teacher: _train(teacher, cfg, execute, stop), stop, swept)
            if config is None:
                return False
        else:
            checkpoint.record_save(config.folder, newest.step)  # of a version that did not, or killed before it could
            stored = read_back(config.folder)
            # Raising `steps` moves the end; what the schedules count to stays as it was first set.
            if config.schedule_steps is None:
                config = config.model_copy(update={"schedule_steps": stored.schedule_steps})
            config = as_it_began(config, stored)
            check_same_run(config.folder, complete(stored), complete(config))
        config = config.model_copy(update={"schedule_steps": config.num_schedule_steps})
        if newest is not None and stored is not None and newest.step >= config.steps:
            found = checkpoint.latest(config.folder, set_aside=True)  # verified: a damaged end is trained again
            if found is not None and found[1].step >= config.steps:
                store_config(config.folder, dump(config) | {"teacher": stored.teacher})
                say(f"{config.folder} is finished at step {found[1].step}; steps=... beyond that goes on")
                return True
            newest = None if found is None else found[1]
        if newest is not None:
            config.check_machine()
            config = find_again(config, stored, newest.provenance.get("teacher"))
        store_config(config.folder, dump(config))
        began = announce.header(config)
        if config.optimizer.get("schedule") == "cosine" and config.steps > config.num_schedule_steps:
            say(f"note: the learning rate is 0 from step {config.num_schedule_steps} on, where its cosine ended")
        finished = execute(config)
        announce.summary(config, began, finished, newest, checkpoint.newest_manifest(config.folder))
        return finished
