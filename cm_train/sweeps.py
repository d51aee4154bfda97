"""Multirun: one run a job, in whatever processes Hydra's launcher runs them, and the table at the end.

What the jobs share lies in the sweep's folder, `runs/sweeps/<swept keys>-<hash>`, since a job may run on another
machine: `sweep.json` (what is swept, and since when), `jobs/` (what became of each), and `stop` once all are to stop.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from . import cli, sweep_table
from .errors import InputError
from .files import write_whole
from .run_folder import lock
from .runs import train
from .signals import StopFlag
from .sweep_table import Job, final_metric

_NOT_IN_NAMES = {"dataset", "mode", "name", "run_dir"}  # a run's name has the first two in any case
_STATES = {cli.DONE: "finished", cli.FAILED: "failed", cli.WRONG_INPUT: "refused", cli.STOPPED: "stopped"}


def _jobs_at_once(launcher: str) -> int:
    """Of a launcher that works side by side on this machine: one job a GPU; without any, one a core, eight at most."""
    from . import gpus

    if "joblib" not in launcher:
        return 1
    return len(gpus.visible()) or min(8, os.cpu_count() or 1)


OmegaConf.register_new_resolver("jobs_at_once", _jobs_at_once)

_here: list[Path] = []  # the folder of the sweep that this process leads, where it leads one


def asked_for(arguments: list[str]) -> bool:
    """Whether the command line asks for a multirun. Under torchrun it is refused elsewhere."""
    flags = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
    return bool(flags & set(arguments)) and "RANK" not in os.environ


def lead(stop: StopFlag) -> NoReturn:
    """The command's own process: run the sweep, print its table, exit with 0 if every job finished."""
    started = time.time()
    cli.heed_quiet()
    try:
        swept = _swept(sys.argv[1:])
    except HydraException:
        swept = []  # Hydra says it better
    given = next((a for a in sys.argv[1:] if a.startswith("hydra.sweep.dir=")), None)
    if given is None:
        given = f"hydra.sweep.dir={_folder(swept, sys.argv[1:])}"
        sys.argv.append(given)
    folder = Path(given.split("=", 1)[1])
    new = not folder.exists()
    code = cli.DONE
    try:
        with lock(folder), _stoppable(folder, stop):
            _clear(folder)
            values = {"argv": sys.argv, "keys": [o.key_or_group for o in swept], "started": started}
            write_whole(folder / "sweep.json", json.dumps(values, indent=1).encode())
            _here.append(folder.resolve())
            try:
                code = cli.under_hydra("train", job)
            except SystemExit as end:  # of a job that was stopped, or a launcher that has nothing to run
                code = int(end.code or 0)
    except InputError as error:
        cli.complain(str(error))
        sys.exit(cli.WRONG_INPUT)
    jobs = sweep_table.read_jobs(folder, _grid(swept))
    if not jobs:
        if new:
            shutil.rmtree(folder, ignore_errors=True)  # of a command with a typing mistake nothing shall remain
        sys.exit(code)
    stopped = (folder / "stop").exists()
    sweep_table.show(jobs, folder, time.time() - started)
    sys.exit(_exit_code(jobs, stopped, code))


def _exit_code(jobs: list[Job], stopped: bool, code: int) -> int:
    bad = {j.state for j in jobs} & {"failed", "refused", "killed"}
    if bad:
        return cli.WRONG_INPUT if bad == {"refused"} else cli.FAILED
    return cli.STOPPED if stopped else code


def _swept(arguments: list[str]) -> list[Override]:
    """The overrides of the command line that stand for several values. Raises HydraException."""
    given = [a for a in arguments if "=" in a and not a.startswith("-")]
    return [o for o in OverridesParser.create().parse_overrides(given) if o.is_sweep_override()]


def _folder(swept: list[Override], arguments: list[str]) -> Path:
    """Of the same sweep always the same, so that a search finds its trials again."""
    what = "-".join(o.key_or_group for o in swept) or "sweep"
    own = sorted(a for a in arguments if "=" in a and not a.startswith("hydra"))
    return Path("runs/sweeps") / f"{_clean(what)}-{hashlib.sha256(' '.join(own).encode()).hexdigest()[:6]}"


def _grid(swept: list[Override]) -> list[str]:
    """What each job of a grid sets, in Hydra's order; none where a search chooses as it goes."""
    if not all(o.is_discrete_sweep() for o in swept):
        return []
    values = [[f"{o.key_or_group}={v}" for v in o.sweep_string_iterator()] for o in swept]
    return [" ".join(combination) for combination in itertools.product(*values)]


def _clean(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)


def _clear(folder: Path) -> None:
    """Forget the last time that this sweep ran; its runs are elsewhere."""
    shutil.rmtree(folder / "jobs", ignore_errors=True)
    (folder / "jobs").mkdir()
    (folder / "stop").unlink(missing_ok=True)


@contextmanager
def _stoppable(folder: Path, stop: StopFlag) -> Iterator[None]:
    """Hand a signal to this process on to all jobs, wherever they are."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if stop():
                _stop_all(folder)

    thread = threading.Thread(target=watch, name="sweep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _stop_all(folder: Path) -> None:
    with suppress(OSError):  # a full disk; the caller tries again or the jobs get signals of their own
        (folder / "stop").touch()


# ------------------------------------------------------------------------------------------------------------ one job


def job(cfg: DictConfig) -> float:
    """One job, in whatever process the launcher chose; never raises what its run did.

    Returns:
        The metric that `objective_metric` names, for sweepers that search; NaN where there is none.
    """
    from . import slurm  # torch is imported from here on

    folder = Path(HydraConfig.get().sweep.dir).resolve()
    leading = folder in _here
    sweep = json.loads((folder / "sweep.json").read_text())
    if not leading:
        sys.argv[:] = sweep["argv"]  # what messages and locks call this command
    record = Job(int(HydraConfig.get().job.num), " ".join(_own(sweep)))
    nodes = slurm.nodes()
    writes = nodes is None or nodes.index == 0
    with StopFlag(file=folder / "stop") as stop:
        if stop():
            return math.nan
        _settle(cfg, sweep, folder)
        record.folder = str(cfg.run_dir)
        if writes:
            record.write(folder)
        began = time.time()
        outcome = _attempt(cfg, stop, sweep["started"], nodes)
    record.state, record.complaint = _STATES[outcome.code], outcome.complaint
    record.seconds = time.time() - began
    value = _read_metric(cfg, record)
    if writes:
        record.write(folder)
        if outcome.complaint:
            cli.complain(f"job {record.number} ({record.swept}): {outcome.complaint}")
    slurm.requeue_if_asked(stop)
    # What stops one job of a cluster, its time limit or a scancel, is nothing to the others.
    if (outcome.code == cli.STOPPED and not slurm.in_job()) or (outcome.code != cli.DONE and cfg.fail_fast):
        _stop_all(folder)
        if leading:
            sys.exit(outcome.code)  # past Hydra, which would start the next job
    if not leading:
        # Ctrl-C reaches every process of the terminal; this one waits for its next job and hears of it by the file.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return value


def _settle(cfg: DictConfig, sweep: dict[str, Any], folder: Path) -> None:
    """Name the job's run after what it sets, and its curves' group after the sweep."""
    parts = [part.replace("=", "-") for part in _own(sweep) if part.split("=")[0] not in _NOT_IN_NAMES]
    if parts and not {"name", "run_dir"} & set(sweep["keys"]):
        cfg.name = "-".join([cfg.name, *map(_clean, parts)])
    if cfg.tracking.group is None:
        cfg.tracking.group = folder.name


def _attempt(cfg: DictConfig, stop: StopFlag, started: float, nodes: Any) -> cli.Outcome:
    try:
        if nodes is None:
            return cli.attempt(lambda: train(cfg, stop, started))
        return cli.attempt(lambda: _train_across(cfg, stop, nodes))
    except Exception as error:  # our own mistake, but the other jobs' runs are as good as ever
        traceback.print_exc()
        return cli.Outcome(cli.FAILED, f"{type(error).__name__}: {error}")


def _train_across(cfg: DictConfig, stop: StopFlag, nodes: Any) -> int:
    """This node's part of a run on several: the ranks compose the config themselves, as under torchrun."""
    from . import checkpoint, launching
    from .slurm_launcher import job_arguments

    settled = job_arguments(**{"name": cfg.name, "tracking.group": cfg.tracking.group})
    code = launching.launch_across(nodes, launching.num_ranks(cfg.devices), "cm_train.train", settled, stop)
    if code != cli.DONE:
        return code
    newest = checkpoint.newest_manifest(Path(os.path.expanduser(cfg.run_dir)))
    return cli.DONE if newest is not None and newest.finished else cli.STOPPED


def _own(sweep: dict[str, Any]) -> list[str]:
    """What this job sets of what is swept, as "seed=0"."""
    hydra = HydraConfig.get()
    swept = set(sweep["keys"]) | set(dict(hydra.sweeper.get("params") or {}))
    overrides = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    return [f"{o.key_or_group}={o.get_value_string()}" for o in overrides if o.key_or_group in swept]


def _read_metric(cfg: DictConfig, record: Job) -> float:
    """The run's last `objective_metric`, put into its record; a finished run without one has failed."""
    name, record.step, value = final_metric(Path(os.path.expanduser(record.folder)), cfg.objective_metric)
    if value is not None:
        record.metric = name, value
    elif record.state == "finished" and cfg.objective_metric is not None:
        record.state = "failed"
        record.complaint = f"objective_metric={name} is not in its metrics.jsonl"
    return value if value is not None and record.state == "finished" else math.nan
