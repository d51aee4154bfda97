"""What the commands share: finding conf/, running Hydra, and turning errors into one line and an exit code."""

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .. import __version__
from .command_line import tidy, with_configs_of_plugins
from .configs import conf_dir, groups, keys_of, one_line
from .errors import ExitCode, InputError, TrainingFailed, printable
from .streams import give_up_stdout, hold_streams
from .wrapping import columns_of, fitted

# What the user says; for Hydra it is then set in any case, so that it raises its errors to us.
FULL_ERRORS = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("0", "")

_SCREEN = 80  # columns of help that goes to no terminal


def version(package: str) -> str:
    """Of an installed package, or what to say where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Outcome:
    """How a command's work ended: its exit code, and what there is to say about it."""

    code: ExitCode
    complaint: str = ""


def attempt(body: Callable[[], ExitCode], full: bool = False) -> Outcome:
    """`body`'s outcome; an error that is the user's to mend becomes one line, unless `full`."""
    try:
        return Outcome(body())
    except InputError as error:
        if full:
            raise
        return Outcome(ExitCode.WRONG_INPUT, str(error))  # empty where the ranks have said it
    except TrainingFailed as error:
        if full:
            raise
        return Outcome(ExitCode.FAILED, str(error))
    except OSError as error:
        if full or error.errno is None:
            raise
        where = error.filename or "in the run folder"
        fix = "; the same command goes on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return Outcome(ExitCode.FAILED, f"{error.strerror}: {where}{fix}")


def run(config_name: str, body: Callable[[DictConfig], ExitCode]) -> NoReturn:
    """Run `body` on the composed config and exit with its code, or with 2 after one line on wrong input."""
    codes: list[ExitCode] = []  # one a job

    def task(cfg: DictConfig) -> None:
        outcome = attempt(lambda: body(cfg), FULL_ERRORS)
        if outcome.complaint:
            complain(outcome.complaint)
        codes.append(outcome.code)

    codes.append(under_hydra(config_name, task))
    sys.exit(max(codes))


def under_hydra(config_name: str, task: Callable[[DictConfig], Any]) -> ExitCode:
    """Have Hydra compose the config and run `task` on it; 0, or the exit code of what Hydra found wrong."""
    composed = False

    def begun(cfg: DictConfig) -> Any:
        nonlocal composed
        composed = True
        return task(cfg)

    logging.raiseExceptions = False  # what Hydra can't print, since nobody listens, is no reason to print more
    os.environ["HYDRA_FULL_ERROR"] = "1"
    warnings.filterwarnings("error", ".* is not available")  # what hydra.searchpath names, and is not there
    try:
        with _help_fitted(config_name):
            hydra.main(version_base=None, config_path=str(conf_dir()), config_name=config_name)(begun)()
    except (HydraException, OmegaConfBaseException, InputError) as error:
        if FULL_ERRORS:
            raise
        complain(one_line(error, config_name))
        return ExitCode.WRONG_INPUT
    except BrokenPipeError:  # as in --info | head
        give_up_stdout()
        return ExitCode.FAILED
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError, UserWarning) as error:
        if FULL_ERRORS or composed:
            raise
        if isinstance(error, OSError):  # as where what is printed goes to a full disk
            give_up_stdout()
            complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
            return ExitCode.FAILED
        # What is typed can make Hydra stumble in many ways before anything has begun.
        complain(f"can't compose the config: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return ExitCode.WRONG_INPUT
    except KeyboardInterrupt:
        from .terminal import restore_cursor

        restore_cursor()
        return ExitCode.FAILED
    return ExitCode.DONE


@contextlib.contextmanager
def _help_fitted(config_name: str) -> Iterator[None]:
    """What Hydra prints for --help, of the command's own groups, in lines of a screen's width, in a file too."""
    if "--help" not in sys.argv:
        yield
        return
    taken = io.StringIO()
    try:
        with contextlib.redirect_stdout(taken):
            yield
    finally:
        others = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {*groups(config_name)}
        lines = taken.getvalue().rstrip("\n").split("\n")
        text = "\n".join(line for line in lines if line.strip().partition(":")[0] not in others)
        print(fitted(text, columns_of(sys.stdout) or _SCREEN), flush=True)


def begin(config_name: str, plain: str | None = None) -> None:
    """What every command does first, before it looks at its arguments; it may be all that a command does.

    Args:
        plain: the key that an argument without one is for.
    """
    hold_streams()
    _heed_quiet()
    if "--version" in sys.argv[1:]:
        tell(f"{Path(sys.argv[0]).name} {__version__}")
        sys.exit(ExitCode.DONE)
    try:
        os.getcwd()
    except OSError as error:
        complain(f"the current folder is not there any more: {error.strerror}; fix: cd to one that is")
        sys.exit(ExitCode.WRONG_INPUT)
    try:
        arguments = tidy(sys.argv[1:], groups(config_name), plain, lambda word: keys_of(config_name).meant_by(word))
        sys.argv[1:] = with_configs_of_plugins(arguments)
    except InputError as error:
        complain(str(error))
        sys.exit(ExitCode.WRONG_INPUT)


def _heed_quiet() -> None:
    """Take --quiet off the command line, which is Hydra's, and see that the ranks hear of it too."""
    if not {"--quiet", "-q"} & set(sys.argv[1:]):
        return
    from .terminal import silence

    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in ("--quiet", "-q")]
    silence()


def tell(text: str) -> None:
    """Print what was asked for. Exits with 1 where nobody can take it."""
    try:
        print(fitted(text, columns_of(sys.stdout)), flush=True)
    except OSError as error:
        give_up_stdout()
        complain(f"can't write: {error.strerror}")
        sys.exit(ExitCode.FAILED)


def complain(text: str) -> None:
    """One line on stderr, in the command's name."""
    name = Path(sys.argv[0]).name
    with contextlib.suppress(OSError):  # nobody listens; the exit code still tells
        print(fitted(f"{name}: {printable(text)}", columns_of(sys.stderr)), file=sys.stderr, flush=True)
