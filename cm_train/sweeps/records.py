"""What a sweep keeps in its folder: what is swept, and what became of each job."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from ..core.errors import ExitCode, InputError
from ..core.files import write_whole
from ..core.run_layout import METRICS
from ..training.tracking import last_values

_SWEEP, _JOBS, _STOP = "sweep.json", "jobs", "stop"


class JobState(StrEnum):
    """What became of a job."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    REFUSED = "refused"  # for wrong input
    KILLED = "killed"  # said by the leader, of one that has ended and left no word
    NOT_STARTED = "not started"  # likewise

    @classmethod
    def after(cls, code: ExitCode) -> "JobState":
        """What became of a job that ended with `code`."""
        return {
            ExitCode.DONE: cls.FINISHED,
            ExitCode.FAILED: cls.FAILED,
            ExitCode.WRONG_INPUT: cls.REFUSED,
            ExitCode.STOPPED: cls.STOPPED,
        }[code]


@dataclass(frozen=True)
class SweepRecord:
    """What a sweep's jobs hear of it, wherever they run.

    Attributes:
        argv: of the command.
        keys: that it sweeps.
        total: the number of its jobs; 0 where that is found out as it goes.
        pid: of the process that leads it.
        started: when it began, in seconds since the epoch: tells it from an earlier sweep of the same folder.
        clock: the same by time.monotonic() of the leader's machine.
    """

    argv: list[str]
    keys: list[str]
    total: int
    pid: int
    started: float
    clock: float

    def write(self, folder: Path) -> None:
        """Write it into the sweep's folder. Raises OSError."""
        write_whole(folder / _SWEEP, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "SweepRecord":
        """What `write` has written."""
        return cls(**json.loads((folder / _SWEEP).read_text()))


def is_sweeps(folder: Path) -> bool:
    """Whether a sweep has been in `folder`."""
    return (folder / _SWEEP).exists()


def jobs_folder(folder: Path) -> Path:
    """Where the records of a sweep's jobs lie."""
    return folder / _JOBS


def stop_file(folder: Path) -> Path:
    """What is there once all jobs of a sweep are to stop."""
    return folder / _STOP


def ask_to_stop(folder: Path) -> None:
    """Have all jobs of a sweep stop."""
    with suppress(OSError):  # a full disk; where it matters it is tried again
        stop_file(folder).touch()


@dataclass
class Job:
    """What is known of one job; a file of the sweep's folder."""

    number: int
    swept: str  # "mode=cd seed=0"
    sweep: float = 0.0  # when the command began that ran it, in seconds since the epoch
    state: JobState = JobState.RUNNING
    folder: str = ""
    step: int | None = None
    metric: tuple[str, float] | None = None
    took_s: float = 0.0
    complaint: str = ""

    @property
    def label(self) -> str:
        """As in "job 3 (mode=cd seed=0)"."""
        return f"job {self.number} ({self.swept})" if self.swept else f"job {self.number}"

    def measure(self, metric: str | None = None) -> tuple[str, float | None]:
        """Note how far its run has come; returns the name and the value of `metric`, see `final_metric`."""
        from ..models.checkpoints import read as checkpoint  # torch is imported from here on

        folder = Path(os.path.expanduser(self.folder))
        newest = None
        with suppress(InputError):  # whoever trains it says so
            newest = checkpoint.newest_manifest(folder)
        name, logged, value = final_metric(folder, metric)
        self.step = logged if newest is None else newest.step
        if value is not None:
            self.metric = name, value
        return name, value

    def write(self, folder: Path) -> None:
        """Write it into the sweep's folder; not where the disk is full."""
        with suppress(OSError):  # a full disk
            write_whole(jobs_folder(folder) / f"{self.number:05d}.json", json.dumps(asdict(self), indent=1).encode())


def final_metric(folder: Path, name: str | None = None) -> tuple[str, int | None, float | None]:
    """The name of a metric, the last step logged, and the last value that the run in `folder` has logged of it.

    Args:
        name: as in metrics.jsonl; "agreement" stands for "agreement_rms". None: that where it was measured, else the
            loss.
    """
    values = last_values(folder / METRICS)
    if name is None:
        name = "agreement_rms" if "agreement_rms" in values else "loss"
    name = {"agreement": "agreement_rms"}.get(name, name)
    step = values.get("step")
    return name, None if step is None else int(step), values.get(name)


def read_jobs(folder: Path, sweep: float, grid: Sequence[str] = ()) -> list[Job]:
    """All jobs of a sweep that has ended, by number.

    Args:
        sweep: when its command began, since the folder may hold records of an earlier one.
        grid: what each job sets, where that is known and those that were not started belong to it.
    """
    jobs = {}
    for path in sorted(jobs_folder(folder).glob("*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):  # somebody else's file
            values = json.loads(path.read_text())
            job = Job(**values | {"state": JobState(values["state"])})
            if job.sweep == sweep:
                jobs[job.number] = job
    for j in jobs.values():
        if j.state == JobState.RUNNING:  # and nobody is left who could be
            j.state = JobState.KILLED
            if j.folder:
                j.measure()
    missing = [Job(i, swept, state=JobState.NOT_STARTED) for i, swept in enumerate(grid) if i not in jobs]
    return sorted([*jobs.values(), *missing], key=lambda job: job.number)
