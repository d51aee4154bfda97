"""One job of a sweep, in whatever process Hydra's launcher runs it: its run, and the record of what became of it."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..core import cli
from ..core.errors import ExitCode, InputError, TrainingFailed
from ..core.override import quoted
from ..core.signals import StopFlag
from ..core.terminal import labelled, say
from ..runs.lock import FolderInUse
from ..runs.surroundings import Surroundings
from ..runs.train import SWEPT, train
from .launchers.register import works_side_by_side
from .measured import remembered
from .naming import name_run, own_settings
from .records import Job, JobState, SweepRecord, ask_to_stop, read_jobs, stop_file

if TYPE_CHECKING:
    from ..runs.launch import Nodes


def run(cfg: DictConfig) -> float | None:
    """The job; never raises what went wrong with its run.

    Returns:
        The metric that `objective_metric` names, for sweepers that search; None where there is none.
    """
    from . import slurm_job as slurm  # torch is imported from here on

    job = _Job(cfg)
    with StopFlag(file=stop_file(job.folder)) as stop:
        if stop():
            return None
        value = job.train(stop)
    slurm.requeue_if_asked(stop)
    job.stop_others_if_it_must()
    return value


class _Job:
    """A job in its process: who it is in its sweep, and what becomes of it.

    Attributes:
        folder: the sweep's.
        is_leading: whether it runs in the sweep's own process, as where jobs run one after another.
        home: where its record goes; None on all nodes of several but the first, which speaks for all.
    """

    def __init__(self, cfg: DictConfig):
        from ..runs import rank
        from . import slurm_job as slurm

        hydra = HydraConfig.get()
        self.cfg, self.folder = cfg, Path(hydra.sweep.dir).resolve()
        self.sweep = SweepRecord.read(self.folder)
        self._is_child = os.getppid() == self.sweep.pid
        self.is_leading = os.getpid() == self.sweep.pid and not slurm.in_job()
        if not self.is_leading:
            sys.argv[:] = self.sweep.argv  # what messages and locks call this command
            if self._is_child:
                rank.die_with_parent()
        self.is_beside_others = works_side_by_side(hydra.launcher["_target_"])
        self.record = Job(int(hydra.job.num), " ".join(own_settings(self.sweep)), sweep=self.sweep.started)
        self.nodes = slurm.nodes()
        self.home = self.folder if self.nodes is None or self.nodes.index == 0 else None
        self._lacks_metric = False

    def train(self, stop: StopFlag) -> float | None:
        """The run and its record; see `run`."""
        record, began = self.record, time.monotonic()
        if self.home is not None:
            total = f" of {self.sweep.total}" if self.sweep.total else ""
            say(f"{record.label}{total}")
        with labelled(f"job {record.number}") if self.is_beside_others else nullcontext():
            outcome = self._attempt(stop, began)
        record.took_s = time.monotonic() - began
        record.state, record.complaint = JobState.after(outcome.code), outcome.complaint
        value = self._read_metric()
        if self.home is not None:
            record.write(self.home)
            if record.complaint:
                cli.complain(f"{record.label}: {record.complaint}")
        return value

    def stop_others_if_it_must(self) -> None:
        """End the sweep where this job was stopped, or has failed in a way that ends it. May end this process."""
        from . import slurm_job as slurm

        has_failed = self.record.state in (JobState.FAILED, JobState.REFUSED)
        is_hopeless = self._lacks_metric and _is_search()  # every trial would end so
        # What stops one job of a cluster, its time limit or a scancel, is nothing to the others.
        was_stopped = self.record.state == JobState.STOPPED and not slurm.in_job()
        if was_stopped or (has_failed and self.cfg.fail_fast) or is_hopeless:
            ask_to_stop(self.folder)
            if self.is_leading:
                code = next(code for code in ExitCode if JobState.after(code) == self.record.state)
                sys.exit(code)  # past Hydra, which would start the next job

    def _attempt(self, stop: StopFlag, began: float) -> cli.Outcome:
        def body() -> ExitCode:
            name_run(self.cfg, self.sweep)
            self.record.folder = str(self.cfg.run_dir)
            if self.home is not None:
                self.record.write(self.home)
                _check_folder(self.record, self.home)
            if self.nodes is not None:
                return _train_across(self.cfg, stop, self.sweep, self.nodes)
            return when_free(lambda: self._train(stop, began), stop)

        try:
            return cli.attempt(body)
        except Exception as error:  # our own mistake, but the other jobs' runs are as good as ever
            traceback.print_exc()
            return cli.Outcome(ExitCode.FAILED, f"{type(error).__name__}: {error}")

    def _train(self, stop: StopFlag, began: float) -> ExitCode:
        from ..runs.config import Composed

        return train(Composed.of(self.cfg), stop, self._started(began), self._surroundings(stop))

    def _started(self, began: float) -> float:
        """What max_hours counts from: not the wait in a cluster's queue, nor by another machine's clock."""
        from . import slurm_job as slurm

        return self.sweep.clock if self.is_leading or (self._is_child and not slurm.in_job()) else began

    def _surroundings(self, stop: StopFlag) -> Surroundings:
        from . import gpus
        from . import slurm_job as slurm

        keys = frozenset(self.sweep.keys)
        around = Surroundings(
            keys,
            own_process=True,
            shares_machine=self.is_beside_others,
            remembered=lambda run, measure: remembered(self.folder, run, measure, stop),
        )
        # Slurm sees to its jobs' GPUs itself, and calls the first one of each job 0.
        return around if slurm.in_job() else replace(around, reserved=gpus.reserved)

    def _read_metric(self) -> float | None:
        """The run's last `objective_metric`, put into its record; a finished run without one has failed."""
        record, asked = self.record, self.cfg.objective_metric
        if record.state == JobState.REFUSED:
            return None  # whatever is in the folder is not this job's
        name, value = record.measure(asked)
        if value is None and record.state == JobState.FINISHED and asked is not None:
            self._lacks_metric = True
            record.state = JobState.FAILED
            record.complaint = f"objective_metric={name} is not in its metrics.jsonl"
        return value if record.state == JobState.FINISHED else None


def when_free(work: Callable[[], ExitCode], stop: StopFlag) -> ExitCode:
    """`work`, once no other job of the sweep is in the run's folder: it may be the teacher of one."""
    said = False
    while not stop():
        try:
            return work()
        except FolderInUse as error:
            if not error.is_kin:
                raise
            if not said:
                say(f"waiting: {error.situation}")
            said = True
            time.sleep(1)
    return ExitCode.STOPPED


def _check_folder(record: Job, home: Path) -> None:
    """Refuse to share a run folder with an earlier job of this sweep. Raises InputError."""
    for other in read_jobs(home, record.sweep):
        # One that sets the same is the same run, and finds it finished.
        if other.number < record.number and other.folder == record.folder and other.swept != record.swept:
            raise InputError(
                f"job {other.number} of this sweep has the run folder {record.folder} too",
                fix="leave run_dir alone, or put what is swept into it, as in 'run_dir=runs/x-${seed}'",
            )


def _train_across(cfg: DictConfig, stop: StopFlag, sweep: SweepRecord, nodes: "Nodes") -> ExitCode:
    """This node's part of a run on several: the ranks compose the config themselves, as under torchrun."""
    from ..models.checkpoints import read as checkpoint
    from ..runs import launch as launching

    os.environ[SWEPT] = " ".join(sweep.keys)
    arguments, num = as_arguments(cfg), launching.num_ranks(cfg.devices)
    ended = launching.launch_across(nodes, num, "cm_train.commands.train", arguments, stop)
    if ended.code == ExitCode.WRONG_INPUT:
        raise InputError(ended.words or "the log of its first node says what is wrong")
    if ended.code != ExitCode.DONE:
        raise TrainingFailed(ended.words or "a rank failed; the job's log says more")
    newest = checkpoint.newest_manifest(Path(os.path.expanduser(cfg.run_dir)))
    return ExitCode.DONE if newest is not None and newest.finished else ExitCode.STOPPED


def as_arguments(cfg: DictConfig) -> list[str]:
    """The arguments with which cm-train, in another process, composes this job's config as it was settled here."""
    config = HydraConfig.get()
    folders = [f"--config-dir={s.path}" for s in config.runtime.config_sources if s.provider == "command-line"]
    places = [override for override in config.overrides.hydra if "searchpath" in override]
    tags = ",".join(map(quoted, cfg.tracking.tags))
    settled = [f"name={quoted(cfg.name)}", f"tracking.group={quoted(cfg.tracking.group)}", f"tracking.tags=[{tags}]"]
    return [*folders, *places, *config.overrides.task, *settled]


def _is_search() -> bool:
    return not str(HydraConfig.get().sweeper["_target_"]).endswith(".BasicSweeper")
