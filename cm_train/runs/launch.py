"""The command's side of ranks: how it starts them, stops them and hears how they ended."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.child_python import import_paths
from ..core.errors import ExitCode, InputError
from ..core.files import not_through_a_link
from ..core.launched import STORE, patience_s
from ..core.signals import EARLY, StopFlag
from ..core.terminal import restore_cursor
from .rank import DEADLINE, PARENT, WORDS

_FAREWELL_S = 10.0  # that the peers of a failed rank get to find out, and to say what they know
_MOST_WORDS = 65536  # bytes that ranks may tell of why they end: what a pipe holds
_MEETING = "cm-train-ranks-"  # how the folders begin in which the ranks of a command meet
_NEW_S = 60.0
_MEETING_BYTES = 1 << 16  # what they write there at most


def num_ranks(devices: int | str, on_cpu: bool = False) -> int:
    """How many ranks `devices` means on this machine; `on_cpu` where its GPUs are not to be used.

    Raises:
        InputError: more than there are, or a value that means nothing.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and not on_cpu else 0
    if devices == "auto":
        return max(gpus, 1)
    most = gpus if gpus else max(8, os.cpu_count() or 1)
    if not isinstance(devices, int) or not 1 <= devices <= most:
        raise InputError("devices must be auto or a number of processes", str(devices), f"auto, 1 to {most} here")
    return devices


@dataclass(frozen=True)
class Ended:
    """How all the ranks of a command ended: with which exit code, and what they told of its cause.

    Attributes:
        says_all: whether that is all there is to say; else they broke off in the middle of something.
    """

    code: ExitCode
    words: str = ""
    says_all: bool = False


@dataclass(frozen=True)
class Nodes:
    """The machines that run one job together: how many, which this is, and where they meet."""

    num: int
    index: int
    host: str  # the first one's name
    port: int  # free on it, and the same on all


def launch(num: int, module: str, argument: str, stop: StopFlag) -> Ended:
    """Run `python -m module argument` as `num` ranks on this machine.

    Once `stop` says so, the ranks are asked to save and end by themselves. A rank that dies takes the others with it
    within seconds. They meet in a private folder and talk over the loopback interface alone: what one of them receives
    it unpickles, so that nobody else may have a say.

    Raises:
        InputError: there is no room for that folder.
    """
    with _meeting_folder() as folder:
        meeting = {STORE: str(folder / "store"), **_loopback()}
        return _supervise(range(num), num, ("-m", module, argument), meeting, stop)


def launch_across(nodes: Nodes, num: int, module: str, arguments: Sequence[str], stop: StopFlag) -> Ended:
    """Run `python -m module arguments...` as `num` ranks on each of `nodes`, as torchrun does; called on every node.

    Returns as `launch` does, for this node's ranks, which are stopped as there; what one node is told, the ranks of all
    agree on. They meet at a port of the first node, and talk as GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME say.
    """
    ranks = range(nodes.index * num, (nodes.index + 1) * num)
    meeting = {"MASTER_ADDR": nodes.host, "MASTER_PORT": str(nodes.port)}
    return _supervise(ranks, nodes.num * num, ("-m", module, *arguments), meeting, stop)


@contextlib.contextmanager
def _meeting_folder() -> Iterator[Path]:
    """A folder of this user alone. Raises InputError where the temporary folder has no room for it."""
    try:
        place = Path(tempfile.gettempdir())
        _sweep_up(place)
        folder = Path(tempfile.mkdtemp(prefix=_MEETING, dir=place))
        room = folder / "room"
        room.write_bytes(bytes(_MEETING_BYTES))
        room.unlink()
        held = open(folder / "held", "w")  # noqa: SIM115 - locked for as long as this process lives
    except OSError as error:
        raise InputError(
            f"no room in the temporary folder for the ranks to meet: {error.strerror or error}",
            fix="make some, or set TMPDIR=... to another folder",
        ) from None
    with held:
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is swept up there
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep_up(place: Path) -> None:
    """Remove what killed commands of this user left: the system has let go of their locks."""
    for folder in place.glob(f"{_MEETING}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            is_new = time.time() - found.st_mtime < _NEW_S  # its owner may be about to lock it
            if is_new or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            with open(folder / "held", opener=not_through_a_link) as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _loopback() -> dict[str, str]:
    """What has gloo and NCCL open no port that another machine could reach, where this one has a loopback interface."""
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def _supervise(
    ranks: Sequence[int], total: int, command: Sequence[str], meeting: Mapping[str, str], stop: StopFlag
) -> Ended:
    """Run the command as these of `total` ranks."""
    patience_s()  # what is wrong with it, one process says better than each rank
    heard, spoken = os.pipe()
    shared = {**_environment(len(ranks)), **meeting, PARENT: str(os.getpid()), WORDS: str(spoken)}
    shared |= {"WORLD_SIZE": str(total), "LOCAL_WORLD_SIZE": str(len(ranks))}
    if stop.deadline is not None:
        shared[DEADLINE] = repr(stop.deadline)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, EARLY)  # the ranks start with these blocked
        try:
            for local, rank in enumerate(ranks):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(local)}
                argv = [sys.executable, *command]
                processes.append(subprocess.Popen(argv, env=own, pass_fds=(spoken,), start_new_session=True))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ended = _outcome(ranks, processes, _attend(processes, stop))
        os.set_blocking(heard, False)
        with contextlib.suppress(BlockingIOError):
            told = os.read(heard, _MOST_WORDS).decode(errors="replace").split("\0")[0]  # the first has the cause
            if told:
                ended = Ended(ended.code, told[1:], told[0] == "1")
    finally:
        for process in processes:
            process.kill()  # but nothing happens to one that has ended
            process.wait()
        os.close(heard)
        os.close(spoken)
    if ended.code != ExitCode.DONE:
        restore_cursor()  # a rank that was killed has left its progress bar standing
    return ended


def _attend(processes: Sequence[subprocess.Popen[bytes]], stop: StopFlag) -> frozenset[int]:
    """Return when all have ended, with the indices of those that another's failure had be ended from here."""
    asked, failed_at, told_to_end = False, None, frozenset[int]()
    while running := [i for i, process in enumerate(processes) if process.poll() is None]:
        if not asked and stop():
            asked = True
            for i in running:
                processes[i].send_signal(EARLY[0])  # a rank that is still starting gets it once it can heed it
        if failed_at is None and any(process.returncode for process in processes):
            failed_at, told_to_end = time.monotonic(), frozenset(running)
            for i in running:
                processes[i].terminate()
        if failed_at is not None and time.monotonic() - failed_at > _FAREWELL_S:
            for i in running:
                processes[i].kill()
        time.sleep(0.05)
    return told_to_end


def _outcome(ranks: Sequence[int], processes: Sequence[subprocess.Popen[bytes]], told_to_end: frozenset[int]) -> Ended:
    """The exit code of all these together, and what killed one of them."""
    # Those that were ended after the first failure have said nothing of their own.
    codes = {
        rank: process.returncode
        for i, (rank, process) in enumerate(zip(ranks, processes, strict=True))
        if i not in told_to_end
    }
    killed = [(rank, -code) for rank, code in codes.items() if code < 0]
    if killed:
        return Ended(ExitCode.FAILED, _obituary(*killed[0]))
    failed = {code for code in codes.values() if code}
    if not failed:
        return Ended(ExitCode.DONE)
    return Ended(ExitCode.WRONG_INPUT if failed == {ExitCode.WRONG_INPUT} else ExitCode.FAILED)


def _obituary(rank: int, number: int) -> str:
    with contextlib.suppress(ValueError):
        name = signal.Signals(number).name
        hint = " (by somebody, or by a system that was out of memory)" if number == signal.SIGKILL else ""
        return f"rank {rank} was killed by {name}{hint}"
    return f"rank {rank} was killed by signal {number}"


def _environment(num: int) -> dict[str, str]:
    """The environment of `num` ranks on this machine."""
    environment = {**os.environ, **import_paths()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = max(1, cores // num)
    environment.setdefault("OMP_NUM_THREADS", str(each))
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(each, 32)))  # torch's own limit
    return environment
