"""Ranks as processes: how a command starts them, stops them and hears how they ended; how a rank begins and ends."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from .distributed import RankLost, World, joined
from .errors import InputError, OutOfMemory, TrainingFailed
from .signals import EARLY, StopFlag
from .tracking import complain
from .tracking.terminal import restore_cursor

# How a command reaches the ranks that it started.
_PARENT, _STOP_FILE, _DEADLINE = "CM_TRAIN_PARENT", "CM_TRAIN_STOP_FILE", "CM_TRAIN_DEADLINE"


def num_ranks(devices: int | str) -> int:
    """How many ranks `devices` means on this machine.

    Raises:
        InputError: more than there are, or a value that means nothing.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices == "auto":
        return max(gpus, 1)
    most = gpus if gpus else max(8, os.cpu_count() or 1)
    if not isinstance(devices, int) or not 1 <= devices <= most:
        raise InputError("devices must be auto or a number of processes", str(devices), f"auto, 1 to {most} here")
    return devices


@dataclass(frozen=True)
class Nodes:
    """The machines that run one job together: how many, which this is, and where they meet."""

    num: int
    index: int
    host: str  # the first one's name
    port: int  # free on it, and the same on all
    job: str  # a name that no other job has


def launch(num: int, module: str, argument: str, stop: StopFlag) -> tuple[int, str]:
    """Run `python -m module argument` as `num` ranks on this machine; their exit code, and what they told of its cause.

    Once `stop` says so, the ranks are asked to save and end by themselves. A rank that dies takes the others with it
    within seconds.
    """
    meeting = {
        "run_id": f"cm-train-{os.getpid()}",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",  # a free port each: two jobs on one machine don't meet
        "local_addr": "localhost",
    }
    return _supervise(1, num, meeting, ("-m", module, argument), stop)


def launch_across(nodes: Nodes, num: int, module: str, arguments: Sequence[str], stop: StopFlag) -> tuple[int, str]:
    """Run `python -m module arguments...` as `num` ranks on each of `nodes`, as torchrun does; called on every node.

    Returns as `launch` does, for this node's ranks, which are stopped as there; what one node is told, the ranks of all
    agree on.
    """
    meeting = {
        "run_id": nodes.job,
        "rdzv_backend": "static",  # so that rank 0 is on node 0
        "rdzv_endpoint": f"{nodes.host}:{nodes.port}",
        "rdzv_configs": {"rank": nodes.index},
    }
    return _supervise(nodes.num, num, meeting, ("-m", module, *arguments), stop)


def _supervise(
    num_nodes: int, num: int, meeting: dict[str, Any], command: Sequence[str], stop: StopFlag
) -> tuple[int, str]:
    ends: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory(prefix="cm-train-", ignore_cleanup_errors=True) as folder, _environment(num):
        stop_file = Path(folder) / "stop"
        os.environ[_PARENT], os.environ[_STOP_FILE] = str(os.getpid()), str(stop_file)
        if stop.deadline is not None:
            os.environ[_DEADLINE] = repr(stop.deadline)
        # The launcher in a thread, since in the main one it would take the signals for itself and kill on them.
        work = threading.Thread(target=lambda: ends.append(_launch(num_nodes, num, meeting, command)), daemon=True)
        work.start()
        while work.is_alive():
            work.join(0.1)
            if stop():
                with contextlib.suppress(OSError):  # tried again in a moment; the system may have swept the folder away
                    stop_file.parent.mkdir(exist_ok=True)
                    stop_file.touch()
        told = _heard(stop_file)
    code, words = ends[0] if ends else (1, "")
    if code:
        restore_cursor()  # a rank that was killed has left its progress bar standing
    return code, told or words


def _launch(num_nodes: int, num: int, meeting: dict[str, Any], command: Sequence[str]) -> tuple[int, str]:
    """The exit code of the ranks on this node, and what killed one of them."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    signal.pthread_sigmask(signal.SIG_BLOCK, EARLY)  # in this thread only, and in the ranks that it starts
    config = LaunchConfig(min_nodes=num_nodes, max_nodes=num_nodes, nproc_per_node=num, max_restarts=0, **meeting)
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        # Ranks that the launcher ended after the first wrong input have said nothing of their own.
        if 2 in codes.values() and set(codes.values()) <= {2, -signal.SIGTERM}:
            return 2, ""
        killed = [(rank, -code) for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
        return 1, _obituary(*killed[0]) if killed else ""
    except DistError as error:
        if num_nodes == 1:
            raise
        complain(f"cm-train: the nodes did not meet at {meeting['rdzv_endpoint']}: {str(error).splitlines()[0]}")
        return 1, ""
    return 0, ""


def _obituary(rank: int, number: int) -> str:
    with contextlib.suppress(ValueError):
        name = signal.Signals(number).name
        hint = " (by somebody, or by a system that was out of memory)" if number == signal.SIGKILL else ""
        return f"rank {rank} was killed by {name}{hint}"
    return f"rank {rank} was killed by signal {number}"


@contextlib.contextmanager
def _environment(num: int):
    """The environment that ranks inherit, for as long as they run."""
    before = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # No rank imports what lies in the current folder, which may be full of a stranger's files; but this very package.
    os.environ["PYTHONSAFEPATH"] = "1"
    own = str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), own]))
    each = max(1, cores // num)
    os.environ.setdefault("OMP_NUM_THREADS", str(each))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(each, 32)))  # torch's own limit
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")  # seconds that the peers of a dead rank get
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def stop_of_parent() -> StopFlag:
    """What stops a rank that `launch` started: signals, and its parent's word and deadline."""
    stop = StopFlag()
    heed_parent(stop)
    return stop


def heed_parent(stop: StopFlag) -> None:
    """Have `stop` heed the word and deadline of the parent too, where `launch` or `launch_across` is that."""
    if _PARENT not in os.environ:
        return
    die_with_parent()
    if sys.platform == "linux" and str(os.getppid()) != os.environ[_PARENT]:  # it ended while this process was starting
        _leave(1)
    deadline, file = os.environ.get(_DEADLINE), os.environ.get(_STOP_FILE)
    if deadline:
        stop.deadline = float(deadline)
    if file:
        stop.file = Path(file)


def tell(text: str) -> None:
    """Say in this rank's last moment why it ends: to the command that started it, or on the terminal where none did."""
    file = os.environ.get(_STOP_FILE)
    if file is not None:
        with contextlib.suppress(OSError):
            _words_file(Path(file)).write_text(text)
            return
    complain(f"cm-train: {text}")


def _heard(stop_file: Path) -> str:
    try:
        return _words_file(stop_file).read_text()
    except OSError:
        return ""


def _words_file(stop_file: Path) -> Path:
    return stop_file.with_name("last_words")


def as_rank(body: Callable[[World], int]) -> NoReturn:
    """Join the other ranks, run `body`, and end this process with its code, or with 1 after one rank has said why."""
    code = 1
    try:
        with joined() as world:
            try:
                code = body(world)
            except OutOfMemory as error:  # this rank's own, and so no way to part from the others in good order
                if world.is_first_to_fail():
                    tell(str(error))
                _leave(1)
            except (InputError, TrainingFailed) as error:  # every rank meets it
                code = 2 if isinstance(error, InputError) else 1
                if world.is_main:
                    tell(str(error))
            except Exception as error:  # this rank's own, and so no way to part from the others in good order
                world.check_peers(error)
                if world.is_first_to_fail():
                    traceback.print_exc()
                    tell(f"{type(error).__name__}: {error}")
                _leave(1)
    except RankLost as error:
        if error.is_speaker:
            tell(str(error))
    except InputError as error:  # there are no such ranks
        code = 2
        if os.environ.get("LOCAL_RANK", "0") == str(torch.cuda.device_count()):  # the first one too many
            tell(str(error))
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End a rank at once with `code`: gloo's threads abort about every other interpreter that waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, however that ended (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
