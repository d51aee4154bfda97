"""What became of each job of a sweep: kept beside it as it runs, read and shown as one table at the end."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.errors import InputError, printable
from ..core.files import write_whole
from ..core.run_layout import METRICS
from ..core.terminal import is_quiet, say
from ..training.tracking import last_values

_LOG_WIDTH = 200  # of a table that goes to no terminal
_ANY_WIDTH = 100_000


@dataclass
class Job:
    """What is known of one job; a file of the sweep's folder."""

    number: int
    swept: str  # "mode=cd seed=0"
    sweep: float = 0.0  # when the command began that ran it, in seconds since the epoch
    state: str = "running"  # then finished, stopped, failed or refused; the table adds killed and not started
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
        with suppress(OSError):  # a full disk
            write_whole(folder / "jobs" / f"{self.number:05d}.json", json.dumps(asdict(self), indent=1).encode())


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
    for path in sorted((folder / "jobs").glob("*.json")):
        with suppress(OSError, ValueError, TypeError):  # somebody else's file
            job = Job(**json.loads(path.read_text()))
            if job.sweep == sweep:
                jobs[job.number] = job
    for j in jobs.values():
        if j.state == "running":  # and nobody is left who could be
            j.state = "killed"
            if j.folder:
                j.measure()
    missing = [Job(i, swept, state="not started") for i, swept in enumerate(grid) if i not in jobs]
    return sorted([*jobs.values(), *missing], key=lambda job: job.number)


def _table(jobs: list[Job]) -> Table:
    metrics = {j.metric[0] for j in jobs if j.metric}
    heading = metrics.pop() if len(metrics) == 1 else "metric"
    table = Table("job", "sets", "state", "step", heading, "minutes", "folder")
    for j in jobs:
        name, value = j.metric or ("", None)
        shown = "" if value is None else f"{value:.4g}" if name == heading else f"{name} {value:.4g}"
        step = "" if j.step is None else j.step
        cells = [j.number, j.swept, j.state, step, shown, f"{j.took_s / 60:.1f}", j.folder]
        table.add_row(*(Text(printable(str(cell))) for cell in cells))
    return table


def _as_record(job: Job) -> list[str]:
    """The lines of one job where the table is too wide: nothing in them is cut, and a folder can be copied."""
    parts = [f"job {job.number}", job.state]
    parts += [] if job.step is None else [f"step {job.step}"]
    parts += [] if job.metric is None else [f"{job.metric[0]} {job.metric[1]:.4g}"]
    parts += [f"{job.took_s / 60:.1f} min"]
    return ["  ".join(parts), *(f"  {detail}" for detail in (job.swept, job.folder) if detail)]


def show(jobs: list[Job], folder: Path, took_s: float) -> None:
    """Print what became of each job, the counts, and why jobs failed."""
    if is_quiet():
        return
    table, console = _table(jobs), Console(stderr=True)
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else _LOG_WIDTH
    if Console(width=_ANY_WIDTH).measure(table).maximum <= width:
        with suppress(OSError, SystemExit):
            Console(stderr=True, width=width).print(table)
    else:
        for j in jobs:
            say("\n".join(_as_record(j)))
    counts = [f"{sum(j.state == s for j in jobs)} {s}" for s in dict.fromkeys(j.state for j in jobs)]
    what = f"{len(jobs)} job{'s' * (len(jobs) > 1)} in {took_s / 60:.1f} minutes"
    say(f"{what}: {', '.join(counts)}; records in {folder}")
    for j in jobs:
        if j.complaint:
            say(f"{j.label}: {j.complaint}")
    if any(j.state != "finished" for j in jobs):
        say("the same command again skips what is finished and goes on with the rest")
