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

from . import cli, plugins, sweep_job, sweep_table
from .errors import InputError
from .files import write_whole
from .run_folder import MAY_CHANGE, lock
from .signals import StopFlag
from .sweep_table import Job

# A sweep that differs in these alone is the same one.
_NO_MATTER = MAY_CHANGE - {"name", "objective_metric", "run_dir", "steps", "teacher"}
_LONGEST_FOLDER = 100


def asked_for(arguments: list[str]) -> bool:
    """Whether the command line asks for a multirun. Under torchrun it is refused elsewhere."""
    wanted = {"-m", "hydra.mode=MULTIRUN", *("--multirun"[:n] for n in range(4, 11))}  # argparse takes beginnings
    return bool(wanted & set(arguments)) and "RANK" not in os.environ


def lead(stop: StopFlag) -> NoReturn:
    """Run the sweep, print its table, and exit with 0 if every job finished."""
    started = time.time()
    cli.heed_quiet()
    try:
        overrides = _overrides(sys.argv[1:])
    except HydraException:
        overrides = []  # Hydra says it better
    swept = [o for o in overrides if o.is_sweep_override()]
    code = cli.DONE
    try:
        folder = _folder(overrides)
        new = not folder.exists()
        with lock(folder), _stoppable(folder, stop):
            _clear(folder)
            _set_folder(folder)
            keys = [o.key_or_group for o in swept]
            values = {"argv": sys.argv, "keys": keys, "started": started, "pid": os.getpid()}
            write_whole(folder / "sweep.json", json.dumps(values, indent=1).encode())
            code = _sweep(folder)
    except InputError as error:
        cli.complain(str(error))
        sys.exit(cli.WRONG_INPUT)
    stopped = stop() or (folder / "stop").exists()
    jobs = sweep_table.read_jobs(folder, _grid(overrides))
    if jobs:
        sweep_table.show(jobs, folder, time.time() - started)
    elif new:
        shutil.rmtree(folder, ignore_errors=True)  # of a command with a typing mistake nothing shall remain
    sys.exit(_exit_code(jobs, stopped, code))


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


def _exit_code(jobs: list[Job], stopped: bool, code: int) -> int:
    bad = {j.state for j in jobs} & {"failed", "refused", "killed"}
    if bad or code not in (cli.DONE, cli.STOPPED):
        return cli.WRONG_INPUT if bad <= {"refused"} and code != cli.FAILED else cli.FAILED
    return cli.STOPPED if stopped or any(j.state != "finished" for j in jobs) else code


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
    own = sorted(o.input_line or "" for o in overrides if not _is_no_matter(o.key_or_group))
    digest = hashlib.sha256(" ".join(own).encode()).hexdigest()[:6]
    return Path("runs/sweeps") / f"{sweep_job.clean(name)[:_LONGEST_FOLDER]}-{digest}"


def _set_folder(folder: Path) -> None:
    """Tell Hydra, in place of what the command line says."""
    arguments = [a for a in sys.argv if not a.lstrip("+").startswith("hydra.sweep.dir=")]
    # Beside the other overrides: argparse takes them from one place only.
    places = [i for i, a in enumerate(arguments) if "=" in a and not a.startswith("-")]
    arguments.insert(places[-1] + 1 if places else len(arguments), f"hydra.sweep.dir='{folder}'")
    sys.argv[:] = arguments


def _is_no_matter(key: str) -> bool:
    return (key.startswith("hydra") and key != "hydra/sweeper") or bool({key, key.split(".")[0]} & _NO_MATTER)


def _grid(overrides: list[Override]) -> list[str]:
    """What each job of a grid sets, in Hydra's order; none where that is found out as the sweep goes."""
    swept = [o for o in overrides if o.is_sweep_override()]
    if any(o.key_or_group == "hydra/sweeper" and o.value() != "basic" for o in overrides):
        return []
    if not all(o.is_discrete_sweep() and "shuffle" not in (o.input_line or "") for o in swept):
        return []
    values = [[f"{o.key_or_group}={v}" for v in o.sweep_string_iterator()] for o in swept]
    return [" ".join(combination) for combination in itertools.product(*values)]


def _clear(folder: Path) -> None:
    """Forget the last time that this sweep ran; its runs are elsewhere.

    Raises:
        InputError: the folder is not a sweep's.
    """
    foreign = {path.name for path in folder.iterdir()} - {".lock"}
    if foreign and not (folder / "sweep.json").exists():
        raise InputError(f"hydra.sweep.dir={folder} is a folder of other things", fix="name one that is not there yet")
    (folder / "jobs").mkdir(exist_ok=True)
    for path in (folder / "jobs").glob("*.json"):
        path.unlink()
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
    with suppress(OSError):  # a full disk; tried again
        (folder / "stop").touch()


def _jobs_at_once(launcher: str) -> int:
    """Of a launcher that works side by side on this machine: one job a GPU; without any, one a core, eight at most."""
    from . import gpus

    if not plugins.works_side_by_side(launcher):
        return 1
    return len(gpus.visible()) or min(8, os.cpu_count() or 1)


OmegaConf.register_new_resolver("jobs_at_once", _jobs_at_once)
