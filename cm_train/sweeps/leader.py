"""Multirun: the command's own process, which leads the jobs that Hydra's launcher runs and prints their table.

What leader and jobs share lies in the sweep's folder, `runs/sweeps/<swept keys>-<hash>`, since a job may run on
another machine: `sweep.json` (what is swept, and since when), `jobs/` (what became of each), and `stop` once all are
to stop.
"""

import hashlib
import itertools
import json
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
from ..core.command_line import IMPLIED, quoted
from ..core.errors import InputError
from ..core.files import write_whole
from ..core.run_layout import LOCK
from ..core.signals import StopFlag
from ..runs.lock import check_words, lock, refuse_links
from ..runs.stored import MAY_CHANGE
from . import job as sweep_job
from . import table as sweep_table
from .launchers import register as plugins
from .table import Job, read_jobs

# A sweep that differs in these alone is the same one.
_NO_MATTER = MAY_CHANGE - {"dataset.root", "name", "objective_metric", "run_dir", "steps", "teacher"}
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
    grid, code, folder = _grid(overrides), cli.DONE, None
    try:
        launched.place()  # what no job could do anything with is refused before the first: half a rank,
        check_words()  # and words that can't be read
        folder = _folder(overrides)
        new = not folder.exists()
        with lock(folder, "sweep's folder", "hydra.sweep.dir"), _stoppable(folder, stop):
            _prepare(folder)
            _set_folder(folder)
            keys = [o.key_or_group for o in overrides if o.is_sweep_override()]
            values = {"argv": sys.argv, "keys": keys, "total": len(grid), "pid": os.getpid()}
            values |= {"started": started, "clock": clock}  # to tell this sweep from others, and to count its time
            write_whole(folder / "sweep.json", json.dumps(values, indent=1).encode())
            code = _sweep(folder)
    except InputError as error:
        cli.complain(str(error))
        sys.exit(cli.WRONG_INPUT)
    except OSError as error:
        cli.complain(f"the sweep's folder {folder}: {error.strerror or error}; fix: set hydra.sweep.dir=...")
        sys.exit(cli.FAILED)
    jobs, signalled = read_jobs(folder, started, grid), stop()
    if signalled or any(j.state != "not started" for j in jobs):
        sweep_table.show(jobs, folder, time.monotonic() - clock)
    else:
        jobs = []
        if new and not (folder / ".submitit").exists():
            _remove(folder)
    sys.exit(_exit_code(jobs, signalled, code))


def _remove(folder: Path) -> None:
    """Of a command with a typing mistake nothing shall remain."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent == _HOME:
        with suppress(OSError):  # they hold something else
            _HOME.rmdir()
            _HOME.parent.rmdir()


def _sweep(folder: Path) -> int:
    try:
        return cli.under_hydra("train", sweep_job.run)
    except SystemExit as end:  # of a job that was stopped, or a launcher that has nothing to run
        return int(end.code or 0)
    except InputError:
        raise
    except Exception as error:  # of the launcher or sweeper itself, as when a worker of joblib's is killed
        if cli.FULL_ERRORS:
            raise
        _stop_all(folder)
        cli.complain(f"the sweep ended early: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return cli.FAILED


def _exit_code(jobs: list[Job], signalled: bool, code: int) -> int:
    """What the sweep ends with, where a signal came or not, and `code` is how launcher and sweeper ended."""
    unfinished = {j.state for j in jobs} - {"finished"}
    if code == cli.FAILED:
        return cli.FAILED
    if signalled and (unfinished or not jobs):
        return cli.STOPPED
    bad = unfinished & {"failed", "refused", "killed"}
    if bad or code == cli.WRONG_INPUT:
        return cli.WRONG_INPUT if bad <= {"refused"} else cli.FAILED
    return cli.STOPPED if unfinished or code == cli.STOPPED else cli.DONE


def _overrides(arguments: list[str]) -> list[Override]:
    """Raises HydraException."""
    return OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and not a.startswith("-")])


def _folder(overrides: list[Override]) -> Path:
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
    return _HOME / f"{sweep_job.clean(name)[:_LONGEST_FOLDER]}-{digest}"


def _set_folder(folder: Path) -> None:
    """Tell Hydra, in place of what the command line says."""
    arguments = [a for a in sys.argv if not a.lstrip("+").startswith("hydra.sweep.dir=")]
    # Beside the other overrides: argparse takes them from one place only.
    places = [i for i, a in enumerate(arguments) if "=" in a and not a.startswith("-")]
    arguments.insert(places[-1] + 1 if places else 1, f"hydra.sweep.dir={quoted(str(folder))}")
    sys.argv[:] = arguments


def _is_no_matter(key: str) -> bool:
    return (key.startswith("hydra") and key != "hydra/sweeper") or bool({key, key.split(".")[0]} & _NO_MATTER)


def _grid(overrides: list[Override]) -> list[str]:
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
    if foreign and not (folder / "sweep.json").exists():
        raise InputError(f"hydra.sweep.dir={folder} is a folder of other things", fix="name one that is not there yet")
    refuse_links(folder, ("jobs", ".submitit"), "hydra.sweep.dir")
    (folder / "jobs").mkdir(exist_ok=True)
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
        if stop():  # in the moment that ended it all
            _stop_all(folder)


def _stop_all(folder: Path) -> None:
    with suppress(OSError):  # a full disk; tried again
        (folder / "stop").touch()


def _jobs_at_once(launcher: str) -> int:
    """Of a launcher that works side by side on this machine: one job a GPU; without any, one a core, eight at most."""
    from . import gpus

    if not plugins.works_side_by_side(launcher):
        return 1
    return len(gpus.visible()) or min(8, os.cpu_count() or 1)


OmegaConf.register_new_resolver("jobs_at_once", _jobs_at_once)
