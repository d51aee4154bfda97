"""A rank's side: how it heeds the command that started it, tells that why it ends, and ends."""

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from ..core import plugins
from ..core.errors import ExitCode, InputError, OutOfMemory, TrainingFailed, printable
from ..core.meeting import joined
from ..core.run_log import note
from ..core.settings import typed
from ..core.signals import StopFlag
from ..core.terminal import complain
from ..core.world import RankLost, World
from ..training.config import RunConfig
from .stored import stored_config

# How a command reaches the ranks that it started: its process, when they stop, and where they may say why they end.
PARENT, DEADLINE, WORDS = "CM_TRAIN_PARENT", "CM_TRAIN_DEADLINE", "CM_TRAIN_WORDS"
_MOST_WORDS = 4000  # bytes; so few are in a pipe whole or not at all


def stop_of_parent() -> StopFlag:
    """What stops a rank that `launch` started: signals, and its parent's word and deadline."""
    stop = StopFlag()
    heed_parent(stop)
    return stop


def heed_parent(stop: StopFlag) -> None:
    """Have `stop` heed the parent's deadline too, and end with it, where `launch` or `launch_across` is the parent."""
    if PARENT not in os.environ:
        return
    die_with_parent()
    if sys.platform == "linux" and str(os.getppid()) != os.environ[PARENT]:  # it ended while this process was starting
        _leave(ExitCode.FAILED)
    if DEADLINE in os.environ:
        stop.deadline = float(os.environ[DEADLINE])


def tell(text: str, says_all: bool) -> None:
    """Say in this rank's last moment why it ends: to the command that started it, or on the terminal where none did.

    Args:
        says_all: whether that is all there is to say; else the command adds what the run can go on from.
    """
    with contextlib.suppress(KeyError, OSError):
        words = f"{int(says_all)}{printable(text)}"
        os.write(int(os.environ[WORDS]), words.encode()[:_MOST_WORDS] + b"\0")
        return
    complain(f"cm-train: {text}")


def in_rank(work: Callable[[RunConfig, Path, StopFlag, World], object]) -> NoReturn:
    """Be a rank that `launch` started, whose one argument is the folder of a config: join the others, and do `work`."""

    def body(world: World) -> int:
        if not any(world.any_rank(stop())):
            plugins.load_in_rank()
            folder = Path(sys.argv[1])
            work(typed(RunConfig, stored_config(folder) or {}), folder, stop, world)
        return ExitCode.DONE

    with stop_of_parent() as stop:
        as_rank(body)


def as_rank(body: Callable[[World], int]) -> NoReturn:
    """Join the other ranks, run `body`, and end this process with its code, or with 1 after one rank has said why."""
    code: int = ExitCode.FAILED
    try:
        with joined(_end_for_lack_of) as world:
            try:
                code = body(world)
            except OutOfMemory as error:  # this rank's own, and so no way to part from the others in good order
                if world.is_first_to_fail():
                    tell(str(error), says_all=True)
                _leave(ExitCode.FAILED)
            except (InputError, TrainingFailed) as error:  # every rank meets it
                code = ExitCode.WRONG_INPUT if isinstance(error, InputError) else ExitCode.FAILED
                if world.is_main:
                    tell(str(error), says_all=True)
            except Exception as error:  # this rank's own, and so no way to part from the others in good order
                world.check_peers(error)
                if world.is_first_to_fail():
                    _print_traceback()
                    tell(f"{type(error).__name__}: {error}", says_all=False)
                _leave(ExitCode.FAILED)
    except RankLost as error:
        _end_for_lack_of(error)
    except InputError as error:  # there are no such ranks
        code = ExitCode.WRONG_INPUT
        if os.environ.get("LOCAL_RANK", "0") == str(torch.cuda.device_count()):  # the first one too many
            tell(str(error), says_all=True)
    except KeyboardInterrupt:
        pass
    except BaseException:
        _print_traceback()
    _leave(code)


def _print_traceback() -> None:
    note(traceback.format_exc())
    with contextlib.suppress(OSError):  # a full disk behind stderr; the parent still hears why
        traceback.print_exc()


def _end_for_lack_of(peer: RankLost) -> NoReturn:
    if peer.is_speaker:
        tell(str(peer), says_all=False)
    _leave(ExitCode.FAILED)


def _leave(code: int) -> NoReturn:
    """End a rank at once with `code`: gloo's threads abort about every other interpreter that waits for them."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk behind it
            stream.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, however that ended (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
