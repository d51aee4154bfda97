"""cm-train: from a composed config to a trained run folder."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from . import cli, slurm_launcher
from .signals import StopFlag

_STARTED = time.time()  # what max_hours counts from: of a sweep, the whole


def train(cfg: DictConfig, stop: StopFlag) -> int:
    _name_sweep_job(cfg)

    from .config import parse  # torch is imported from here on
    from .distributed import is_launched
    from .launching import heed_parent

    config = parse(cfg)
    stop.deadline = None if config.max_hours is None else _STARTED + config.max_hours * 3600
    if is_launched():
        heed_parent(stop)
        _train_as_rank(config, cfg, stop)
    finished = _train(config, cfg, lambda run: _execute(run, stop))
    return cli.DONE if finished else cli.STOPPED


def _train_as_rank(config: Any, cfg: DictConfig, stop: StopFlag) -> NoReturn:
    """Under torchrun: rank 0 plans as the command does alone, and the others run what it sends them."""
    from . import registry, worker
    from .config import RunConfig, dump
    from .errors import InputError
    from .launching import as_rank
    from .tracking import say

    def lead(world: Any) -> int:
        def send_and_run(run: Any) -> bool:
            world.from_main(("run", dump(run)))
            return worker.run(run, stop, world)

        code = cli.DONE
        try:
            _check_launched(config)
            _train(config, cfg, send_and_run)
        except InputError as error:
            say(f"cm-train: {error}")
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
    from .errors import InputError

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise InputError("a sweep can't run under torchrun", "-m", fix="cm-train -m devices=..., without torchrun")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if config.devices not in ("auto", ranks):
        raise InputError("devices and torchrun disagree", f"{config.devices} and {ranks}", fix="drop devices=")


def _execute(config: Any, stop: StopFlag) -> bool:
    """Train a run whose config lies in its folder: here where one process does it, else in ranks of its own."""
    from . import checkpoint, launching, worker
    from .errors import InputError, TrainingFailed

    num = launching.num_ranks(config.devices)
    if num == 1:
        return worker.run(config, stop)
    worker.check_divides(config, num)
    code = launching.launch(num, "cm_train.worker", str(config.folder), stop)
    if code == cli.WRONG_INPUT:
        raise InputError("")  # the ranks have said it
    newest = checkpoint.newest_manifest(config.folder)
    if code != cli.DONE:
        kept = "nothing was saved yet" if newest is None else f"the same command goes on from step {newest.step}"
        raise TrainingFailed(f"a rank failed; {kept}")
    return newest is not None and newest.step >= config.steps


def _train(config: Any, cfg: DictConfig, execute: Callable[[Any], bool]) -> bool:
    """Train the run of `config`, new or resumed; False where it was stopped early."""
    from . import checkpoint, run_folder
    from .config import dump
    from .tracking import say

    with run_folder.lock(config.folder):
        if config.init not in ("random", "teacher"):
            checkpoint.resolve(config.init)
        config.check_machine()
        config = _inherit(config, cfg, execute)
        if config is None:
            return False
        newest = checkpoint.newest_manifest(config.folder)
        # Before its first checkpoint a run has nothing to lose: a mistaken first command may be corrected.
        if newest is not None:
            stored = _stored(config.folder)
            # Raising `steps` moves the end; what the schedules count to stays as it was first set.
            if config.schedule_steps is None:
                config = config.model_copy(update={"schedule_steps": stored.schedule_steps})
            run_folder.check_same_run(config.folder, dump(stored), dump(config))
        config = config.model_copy(update={"schedule_steps": config.num_schedule_steps})
        run_folder.store_config(config.folder, dump(config))
        if newest is not None and newest.step >= config.steps:
            found = checkpoint.latest(config.folder, set_aside=True)  # verified: a damaged end is trained again
            if found is not None and found[1].step >= config.steps:
                say(f"{config.folder} is finished at step {found[1].step}; steps=... beyond that goes on")
                return True
            newest = None if found is None else found[1]
        _print_header(config)
        if config.optimizer.get("schedule") == "cosine" and config.steps > config.num_schedule_steps:
            say(f"note: the learning rate is 0 from step {config.num_schedule_steps} on, where its cosine ended")
        finished = execute(config)
        _print_summary(config, finished, checkpoint.newest_manifest(config.folder))
        return finished


def _stored(folder: Path) -> Any:
    """The typed config of the run in `folder`."""
    from . import registry, run_folder
    from .config import RunConfig
    from .errors import InputError

    values = run_folder.stored_config(folder)
    if values is None:
        raise InputError(
            f"{folder} has checkpoints and no config.yaml", fix="bring it back, or set name=... for a new run"
        )
    return registry.typed(RunConfig, values, f"{folder}/config.yaml")


def _inherit(config: Any, cfg: DictConfig, execute: Callable[[Any], bool]) -> Any:
    """The config with its teacher found (trained first where it is missing), and the teacher's backbone taken.

    None where the teacher's training was stopped.
    """
    from . import checkpoint
    from .errors import InputError

    if not config.needs_teacher():
        return config
    if config.teacher is None:
        home = config.folder.parent / f"{config.dataset['name']}-edm"
        if home.resolve() == config.folder.resolve():
            raise InputError(f"{home} can't be its own teacher", fix="set teacher=..., or init=random")
        if not _teacher_ready(config, cfg, home, execute):
            return None
        config = config.model_copy(update={"teacher": str(home)})
    backbone = checkpoint.resolve(config.teacher)[1].backbone
    if "dropout" in config.backbone and config.backbone["name"] == backbone["name"]:
        backbone = {**backbone, "dropout": config.backbone["dropout"]}  # belongs to the recipe, not to the sizes
    asked = {o.lstrip("+").split("=")[0] for o in HydraConfig.get().overrides.task} - {"backbone.dropout"}
    if backbone != config.backbone and any(key.split(".")[0] == "backbone" for key in asked):
        raise InputError(
            f"a student has its teacher's backbone, and {config.teacher} has another than backbone=... asks for",
            fix="drop backbone=..., or give a teacher of that backbone with teacher=...",
        )
    return config.model_copy(update={"backbone": backbone})


def _teacher_ready(config: Any, cfg: DictConfig, home: Path, execute: Callable[[Any], bool]) -> bool:
    """Make sure of a finished teacher in `home`, of this run's data; False where its training was stopped."""
    from . import checkpoint
    from .errors import InputError
    from .tracking import say

    newest = checkpoint.newest_manifest(home)
    if newest is None or not newest.finished:
        say(f"no finished teacher in {home}: training it first (teacher=... names another)")
        # One that was begun goes on with its own settings, whatever they were.
        teacher = _teacher_config(config, cfg, home) if newest is None else _stored(home)
        teacher = teacher.model_copy(update={"name": home.name, "run_dir": str(home)})
        if not _train(teacher, cfg, execute):
            return False
    data = _stored(home).dataset
    if data != config.dataset:
        raise InputError(
            f"the teacher in {home} was trained on other data: {data}",
            fix="set teacher=..., or run_dir=... in a folder of its own",
        )
    return True


def _teacher_config(config: Any, cfg: DictConfig, home: Path) -> Any:
    """mode=edm with its own recipe for the same data, backbone, precision, seed and tracking."""
    from .config import parse

    choice = HydraConfig.get().runtime.choices["dataset"]
    teacher = compose("train", overrides=["mode=edm", f"dataset={choice}"])
    backbone = OmegaConf.to_container(cfg.backbone)
    assert isinstance(backbone, dict)
    if "dropout" in backbone and "dropout" in teacher.backbone:
        backbone["dropout"] = teacher.backbone.dropout
    with open_dict(teacher):
        teacher.backbone = backbone
        for key in ("dataset", "devices", "precision", "compile", "seed", "tracking"):
            teacher[key] = cfg[key]
        if cfg.guidance != 1:
            teacher.label_dropout = 0.1  # or it could not be guided
        teacher.name, teacher.run_dir = home.name, str(home)
    return parse(teacher)


def _name_sweep_job(cfg: DictConfig) -> None:
    """In a multirun, append this job's swept overrides to its name: one folder a job."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return
    given = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    asked = OverridesParser.create().parse_overrides(given)
    swept = {o.key_or_group for o in asked if o.is_sweep_override()} - {"dataset", "mode", "name"}
    job = OverridesParser.create().parse_overrides(list(hydra_config.overrides.task))
    if swept & {"run_dir"}:
        return
    parts = [f"{o.key_or_group}-{o.get_value_string()}" for o in job if o.key_or_group in swept]
    if parts:
        clean = "".join(c if c.isalnum() or c in "-._" else "-" for c in "-".join(parts))
        cfg.name = f"{cfg.name}-{clean}"


def _print_header(config: Any) -> None:
    from .tracking import say

    source = "" if config.teacher is None else f" from teacher {config.teacher}"
    say(f"{config.mode} on {config.dataset['name']}{source}: {config.steps} steps of {config.batch_size} images")
    say(f"run folder {config.folder}")


def _print_summary(config: Any, finished: bool, newest: Any) -> None:
    from .tracking import say

    if finished:
        say(f"done; samples in {config.folder / 'samples'}. Next: cm-sample ckpt={config.folder}")
    elif newest is None:
        say("stopped before the first step; the same command starts again")
    else:
        say(f"stopped at step {newest.step}, everything saved; the same command goes on. Folder {config.folder}")


def main() -> None:
    with StopFlag() as stop:  # before the heavy imports: a signal is heeded from the first moment
        slurm_launcher.register()
        cli.run("train", lambda cfg: train(cfg, stop))


if __name__ == "__main__":
    main()
