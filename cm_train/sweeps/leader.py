"""Multirun: the command's own process, which leads the jobs that Hydra's launcher runs and prints their table.

What leader and jobs share lies in the sweep's folder, `runs/sweeps/<swept keys>-<hash>`, since a job may run on
another machine: `sweep.json` (what is swept, and since when), `jobs/` (what became of each), and `stop` once all are
to stop.
"""

import hashlib
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ..core import cli, launched
from ..core.child_python import import_paths
from ..core.command_line import IMPLIED
from ..core.errors import ExitCode, InputError
from ..core.override import quoted
from ..core.run_layout import LOCK, clean
from ..core.signals import StopFlag
from ..runs.lock import check_words, lock, refuse_links
from . import job as sweep_job
from . import table as sweep_table
from .launchers import register as plugins
from .measured import measure_first
from .records import Job, JobState, SweepRecord, ask_to_stop, is_sweeps, jobs_folder, read_jobs, stop_file

# Keys that tell one sweep from another, although a resume may change them.
_OF_THE_SWEEP = frozenset(["dataset.root", "name", "objective_metric", "run_dir", "steps", "teacher"])
_HOME, _LONGEST_FOLDER = Path("runs/sweeps"), 100


def asked_for(arguments: list[str]) -> bool:
    """Whether a command line, made tidy, asks for a multirun. Under torchrun it is refused elsewhere."""
    return "--multirun" in arguments and not launched.is_rank()


def lead(stop: StopFlag) -> NoReturn:
    """Run the sweep, print its table, and exit with 0 if every job finished."""
    started, clock = time.time(), time.monotonic()
    os.environ.update(import_paths())  # jobs may be processes of their own
    try:
        overrides = _overrides(sys.argv[1:])
    except HydraException:
        overrides = []  # Hydra says it better
    grid, code, folder = grid_of(overrides), ExitCode.DONE, None
    try:
        launched.place()  # what no job could do anything with is refused before the first: half a rank,
        check_words()  # and words that can't be read
        folder = folder_of(overrides)
        new = not folder.exists()
        with lock(folder, "sweep's folder", "hydra.sweep.dir"), _stoppable(folder, stop):
            _prepare(folder)
            _set_folder(folder)
            keys = [o.key_or_group for o in overrides if o.is_sweep_override()]
            SweepRecord(sys.argv, keys, len(grid), os.getpid(), started, clock).write(folder)
            if any(o.key_or_group == "budget" for o in overrides) and _share_this_machine(overrides):
                measure_first([o.input_line or "" for o in overrides], keys, grid, folder, stop)
            code = _sweep(folder)
    except InputError as error:
        cli.complain(str(error))
        sys.exit(ExitCode.WRONG_INPUT)
    except OSError as error:
        cli.complain(f"the sweep's folder {folder}: {error.strerror or error}; fix: set hydra.sweep.dir=...")
        sys.exit(ExitCode.FAILED)
    jobs, signalled = read_jobs(folder, started, grid), stop()
    if signalled or any(j.state != JobState.NOT_STARTED for j in jobs):
        sweep_table.show(jobs, folder, time.monotonic() - clock)
    else:
        jobs = []
        if new and not (folder / ".submitit").exists():
            _remove(folder)
    sys.exit(exit_code(jobs, signalled, code))


def _remove(folder: Path) -> None:
    """Of a command with a typing mistake nothing shall remain."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent == _HOME:
        with suppress(OSError):  # they hold something else
            _HOME.rmdir()
            _HOME.parent.rmdir()


def _sweep(folder: Path) -> ExitCode:
    try:
        return cli.under_hydra("train", sweep_job.run)
    except SystemExit as end:  # of a job that was stopped, or a launcher that has nothing to run
        if end.code is None:
            return ExitCode.DONE
        return next((code for code in ExitCode if code == end.code), ExitCode.FAILED)
    except InputError:
        raise
    except Exception as error:  # of the launcher or sweeper itself, as when a worker of joblib's is killed
        if cli.FULL_ERRORS:
            raise
        ask_to_stop(folder)
        cli.complain(f"the sweep ended early: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return ExitCode.FAILED


def exit_code(jobs: list[Job], signalled: bool, code: ExitCode) -> ExitCode:
    """What the sweep ends with, where a signal came or not, and `code` is how launcher and sweeper ended."""
    unfinished = {j.state for j in jobs} - {JobState.FINISHED}
    if code == ExitCode.FAILED:
        return ExitCode.FAILED
    if signalled and (unfinished or not jobs):
        return ExitCode.STOPPED
    bad = unfinished & {JobState.FAILED, JobState.REFUSED, JobState.KILLED}
    if bad or code == ExitCode.WRONG_INPUT:
        return ExitCode.WRONG_INPUT if bad <= {JobState.REFUSED} else ExitCode.FAILED
    return ExitCode.STOPPED if unfinished or code == ExitCode.STOPPED else ExitCode.DONE


def _overrides(arguments: list[str]) -> list[Override]:
    """Raises HydraException."""
    return OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and not a.startswith("-")])


def folder_of(overrides: list[Override]) -> Path:
    """Of the same sweep always the same, so that a search finds its trials again. Raises InputError."""
    for o in overrides:
        if o.key_or_group == "hydra.sweep.dir":
            given = str(o.value())
            if "${" in given or "'" in given:
                raise InputError("hydra.sweep.dir must be a plain path", given)
            return Path(given)
    name = "-".join(sorted(o.key_or_group for o in overrides if o.is_sweep_override())) or "sweep"
    lines = [o.input_line or "" for o in overrides if not _is_no_matter(o.key_or_group)]
    own = sorted(line for line in lines if line not in IMPLIED)
    digest = hashlib.sha256(" ".join(own).encode()).hexdigest()[:6]
    return _HOME / f"{clean(name)[:_LONGEST_FOLDER]}-{digest}"


def _set_folder(folder: Path) -> None:
    """Tell Hydra, in place of what the command line says."""
    arguments = [a for a in sys.argv if not a.lstrip("+").startswith("hydra.sweep.dir=")]
    # Beside the other overrides: argparse takes them from one place only.
    places = [i for i, a in enumerate(arguments) if "=" in a and not a.startswith("-")]
    arguments.insert(places[-1] + 1 if places else 1, f"hydra.sweep.dir={quoted(str(folder))}")
    sys.argv[:] = arguments


def _is_no_matter(key: str) -> bool:
    """Whether sweeps that differ in `key` alone are the same one, as where it says how a run is saved or shown."""
    from ..training.config import may_change  # torch is imported from here on

    no_matter = may_change() - _OF_THE_SWEEP
    return (key.startswith("hydra") and key != "hydra/sweeper") or bool({key, key.split(".")[0]} & no_matter)


def _share_this_machine(overrides: list[Override]) -> bool:
    """Whether the jobs run beside one another here, so that none of them could measure anything alone."""
    return any(o.key_or_group == "hydra/launcher" and o.value() == "joblib" for o in overrides)


def grid_of(overrides: list[Override]) -> list[str]:
    """What each job of a grid sets, in Hydra's order; none where that is found out as the sweep goes."""
    swept = [o for o in overrides if o.is_sweep_override()]
    if any(o.key_or_group == "hydra/sweeper" and o.value() != "basic" for o in overrides):
        return []
    keys = [o.key_or_group for o in overrides]
    if not all(o.is_discrete_sweep() and keys.count(o.key_or_group) == 1 for o in swept):
        return []
    if any(word in (o.input_line or "") for o in swept for word in ("shuffle(", "glob(")):
        return []
    values = [[f"{o.key_or_group}={v}" for v in o.sweep_string_iterator()] for o in swept]
    return [" ".join(combination) for combination in itertools.product(*values)]


def _prepare(folder: Path) -> None:
    """Make room for the records of this sweep; those of the last time stay until its jobs write theirs.

    Raises:
        InputError: the folder is not a sweep's.
    """
    foreign = {path.name for path in folder.iterdir()} - {LOCK}
    if foreign and not is_sweeps(folder):
        raise InputError(f"hydra.sweep.dir={folder} is a folder of other things", fix="name one that is not there yet")
    refuse_links(folder, (jobs_folder(folder).name, ".submitit"), "hydra.sweep.dir")
    jobs_folder(folder).mkdir(exist_ok=True)
    stop_file(folder).unlink(missing_ok=True)


@contextmanager
def _stoppable(folder: Path, stop: StopFlag) -> Iterator[None]:
    """Hand a signal to this process on to all jobs, wherever they are."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if stop():
                ask_to_stop(folder)

    thread = threading.Thread(target=watch, name="sweep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if stop():  # in the moment that ended it all
            ask_to_stop(folder)


def _jobs_at_once(launcher: str) -> int:
    """Of a launcher that works side by side on this machine: one job a GPU; without any, one a core, eight at most."""
    from . import gpus

    if not plugins.works_side_by_side(launcher):
        return 1
    return len(gpus.visible()) or min(8, os.cpu_count() or 1)


OmegaConf.register_new_resolver("jobs_at_once", _jobs_at_once)
