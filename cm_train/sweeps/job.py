"""One job of a sweep, in whatever process Hydra's launcher runs it: its run, and the record of what became of it."""

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from ..core import cli
from ..core.command_line import quoted
from ..core.errors import InputError, TrainingFailed
from ..core.signals import StopFlag
from ..core.terminal import labelled, say
from ..runs.lifecycle import SWEPT, Surroundings, train
from ..runs.lock import FolderInUse
from ..training.tracking import OF_ONE_RUN, environment
from .launchers.register import works_side_by_side
from .table import Job, read_jobs

_STATES = {cli.DONE: "finished", cli.FAILED: "failed", cli.WRONG_INPUT: "refused", cli.STOPPED: "stopped"}
_NO_METRIC = "is not in its metrics.jsonl"
_LONGEST_TAG = 64  # wandb's limit
_LONGEST_RUN = 120  # of a run; what is longer is cut and told apart by a hash


def run(cfg: DictConfig) -> float | None:
    """The job; never raises what went wrong with its run.

    Returns:
        The metric that `objective_metric` names, for sweepers that search; None where there is none.
    """
    from ..runs import rank
    from . import slurm_job as slurm  # torch is imported from here on

    folder = Path(HydraConfig.get().sweep.dir).resolve()
    sweep = json.loads((folder / "sweep.json").read_text())
    is_child = os.getppid() == sweep["pid"]
    leading = os.getpid() == sweep["pid"] and not slurm.in_job()
    if not leading:
        sys.argv[:] = sweep["argv"]  # what messages and locks call this command
        if is_child:
            rank.die_with_parent()
    record = Job(int(HydraConfig.get().job.num), " ".join(_own(sweep)), sweep=sweep["started"])
    nodes = slurm.nodes()
    home = folder if nodes is None or nodes.index == 0 else None  # one of several nodes speaks for all
    with StopFlag(file=folder / "stop") as stop:
        if stop():
            return None
        began = time.monotonic()
        # The wait in a cluster's queue is not the job's time; nor has another machine the leader's clock.
        started = sweep["clock"] if leading or (is_child and not slurm.in_job()) else began
        if home is not None:
            total = f" of {sweep['total']}" if sweep["total"] else ""
            say(f"{record.label}{total}")
        beside_others = works_side_by_side(HydraConfig.get().launcher["_target_"])
        with labelled(f"job {record.number}") if beside_others else nullcontext():
            outcome = _attempt(cfg, stop, sweep, record, home, nodes, started)
    record.took_s = time.monotonic() - began
    record.state, record.complaint = _STATES[outcome.code], outcome.complaint
    value = _read_metric(cfg, record)
    if home is not None:
        record.write(home)
        if record.complaint:
            cli.complain(f"{record.label}: {record.complaint}")
    slurm.requeue_if_asked(stop)
    bad = record.state in ("failed", "refused")
    hopeless = bad and record.complaint.endswith(_NO_METRIC) and _is_search()  # every trial would end so
    # What stops one job of a cluster, its time limit or a scancel, is nothing to the others.
    if (record.state == "stopped" and not slurm.in_job()) or (bad and cfg.fail_fast) or hopeless:
        with suppress(OSError):
            (folder / "stop").touch()
        if leading:
            sys.exit(outcome.code)  # past Hydra, which would start the next job
    return value


def _attempt(
    cfg: DictConfig,
    stop: StopFlag,
    sweep: dict[str, Any],
    record: Job,
    home: Path | None,
    nodes: Any,
    started: float,
) -> cli.Outcome:
    def body() -> int:
        _settle(cfg, sweep)
        record.folder = str(cfg.run_dir)
        if home is not None:
            record.write(home)
            _check_folder(record, home)
        if nodes is None:
            return _when_free(lambda: train(cfg, stop, started, _surroundings(sweep)), stop)
        return _train_across(cfg, stop, sweep, nodes)

    try:
        return cli.attempt(body)
    except Exception as error:  # our own mistake, but the other jobs' runs are as good as ever
        traceback.print_exc()
        return cli.Outcome(cli.FAILED, f"{type(error).__name__}: {error}")


def _surroundings(sweep: dict[str, Any]) -> Surroundings:
    from . import gpus
    from . import slurm_job as slurm

    beside_others = works_side_by_side(HydraConfig.get().launcher["_target_"])
    around = Surroundings(frozenset(sweep["keys"]), own_process=True, shares_machine=beside_others)
    # Slurm sees to its jobs' GPUs itself, and calls the first one of each job 0.
    return around if slurm.in_job() else replace(around, reserved=gpus.reserved)


def _when_free(work: Callable[[], int], stop: StopFlag) -> int:
    """`work`, once no other job of the sweep is in the run's folder: it may be the teacher of one."""
    said = False
    while not stop():
        try:
            return work()
        except FolderInUse as error:
            if not error.is_kin:
                raise
            if not said:
                say(f"waiting: {str(error).split('; ')[0]}")
            said = True
            time.sleep(1)
    return cli.STOPPED


def _settle(cfg: DictConfig, sweep: dict[str, Any]) -> None:
    """Name the job's run after what it sets, tag its curves with that, and group them by the sweep."""
    own = _own(sweep)
    named = {"dataset", "mode"} if str(cfg.name) == f"{cfg.dataset.name}-{cfg.mode}" else set()
    # In one order, whatever the command line's.
    parts = sorted(p for p in own if p.split("=")[0] not in named and p != f"experiment={cfg.name}")
    if parts and not {"name", "run_dir"} & set(sweep["keys"]):
        cfg.name = _shortened("-".join([str(cfg.name), *(clean(part) for part in parts)]))
    cfg.tracking.tags = [*(cfg.tracking.tags or environment("tags") or []), *(part[:_LONGEST_TAG] for part in own)]
    if cfg.tracking.group is None:
        cfg.tracking.group = environment("group") or Path(HydraConfig.get().sweep.dir).name
    for variable in OF_ONE_RUN:
        os.environ.pop(variable, None)


def clean(text: str) -> str:
    """`text` as part of a folder's name, which must not hold an = since ckpt=... could not be parsed."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST_RUN:
        return name
    return f"{name[: _LONGEST_RUN - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _check_folder(record: Job, home: Path) -> None:
    """Refuse to share a run folder with an earlier job of this sweep. Raises InputError."""
    for other in read_jobs(home, record.sweep):
        # One that sets the same is the same run, and finds it finished.
        if other.number < record.number and other.folder == record.folder and other.swept != record.swept:
            raise InputError(
                f"job {other.number} of this sweep has the run folder {record.folder} too",
                fix="leave run_dir alone, or put what is swept into it, as in 'run_dir=runs/x-${seed}'",
            )


def _train_across(cfg: DictConfig, stop: StopFlag, sweep: dict[str, Any], nodes: Any) -> int:
    """This node's part of a run on several: the ranks compose the config themselves, as under torchrun."""
    from ..models.checkpoints import read as checkpoint
    from ..runs import launch as launching

    os.environ[SWEPT] = " ".join(sweep["keys"])
    arguments, num = _as_arguments(cfg), launching.num_ranks(cfg.devices)
    code, words = launching.launch_across(nodes, num, "cm_train.commands.train", arguments, stop)
    if code == cli.WRONG_INPUT:
        raise InputError(words or "the log of its first node says what is wrong")
    if code != cli.DONE:
        raise TrainingFailed(words or "a rank failed; the job's log says more")
    newest = checkpoint.newest_manifest(Path(os.path.expanduser(cfg.run_dir)))
    return cli.DONE if newest is not None and newest.finished else cli.STOPPED


def _as_arguments(cfg: DictConfig) -> list[str]:
    """The arguments with which cm-train, in another process, composes this job's config as it was settled here."""
    config = HydraConfig.get()
    folders = [f"--config-dir={s.path}" for s in config.runtime.config_sources if s.provider == "command-line"]
    places = [override for override in config.overrides.hydra if "searchpath" in override]
    tags = ",".join(map(quoted, cfg.tracking.tags))
    settled = [f"name={quoted(cfg.name)}", f"tracking.group={quoted(cfg.tracking.group)}", f"tracking.tags=[{tags}]"]
    return [*folders, *places, *config.overrides.task, *settled]


def _own(sweep: dict[str, Any]) -> list[str]:
    """What this job sets of what is swept, as "seed=0"."""
    hydra = HydraConfig.get()
    swept = set(sweep["keys"]) | set(dict(hydra.sweeper.get("params") or {}))
    overrides = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    return [f"{o.key_or_group}={o.get_value_string()}" for o in overrides if o.key_or_group in swept]


def _read_metric(cfg: DictConfig, record: Job) -> float | None:
    """The run's last `objective_metric`, put into its record; a finished run without one has failed."""
    if record.state == "refused":
        return None  # whatever is in the folder is not this job's
    name, value = record.measure(cfg.objective_metric)
    if value is None and record.state == "finished" and cfg.objective_metric is not None:
        record.state = "failed"
        record.complaint = f"objective_metric={name} {_NO_METRIC}"
    return value if record.state == "finished" else None


def _is_search() -> bool:
    return not str(HydraConfig.get().sweeper["_target_"]).endswith(".BasicSweeper")
