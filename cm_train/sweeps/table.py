"""What became of each job of a sweep, as one table at its end."""

import os
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.errors import printable
from ..core.terminal import is_quiet, say
from .records import Job, JobState

_LOG_WIDTH = 200  # of a table that goes to no terminal
_ANY_WIDTH = 100_000


def _table(jobs: list[Job]) -> Table:
    metrics = {j.metric[0] for j in jobs if j.metric}
    heading = metrics.pop() if len(metrics) == 1 else "metric"
    table = Table("job", "sets", "state", "step", heading, "minutes", "folder")
    for j in jobs:
        name, value = j.metric or ("", None)
        number = "" if value is None else f"{value:.4g}"
        if value is not None and name != heading:
            number = f"{name} {number}"
        step = "" if j.step is None else j.step
        cells = [j.number, j.swept, j.state, step, number, f"{j.took_s / 60:.1f}", j.folder]
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
    if any(j.state != JobState.FINISHED for j in jobs):
        say("the same command again skips what is finished and goes on with the rest")
