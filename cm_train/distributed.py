"""Ranks: who this process is among them, what they agree on, and how a command starts them."""

import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .errors import InputError

# A rank that is silent for this long is taken for dead, and the job ends.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among all that train one run together; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host_group: Any = None  # for what the hosts agree on, past the devices' queues

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def share(self, batch_size: int) -> range:
        """This rank's rows of a global batch, consecutive."""
        each = batch_size // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether any rank says yes; the same answer on every rank."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.host_group)
        return votes.bool().tolist()

    def decide(self, choose: Callable[[], Any]) -> Any:
        """What rank 0 chooses, on every rank. Raises its InputError on every rank too."""
        if self.size == 1:
            return choose()
        answer: tuple[str, Any] = "", None
        if self.is_main:
            try:
                answer = "", choose()
            except InputError as error:
                answer = str(error), None
        message, value = self.from_main(answer)
        if message:
            raise InputError(message)
        return value

    def first_of(self, message: str) -> str:
        """The message of the lowest rank that has one."""
        if self.size == 1:
            return message
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, message, group=self.host_group)
        return next((m for m in messages if m), "")

    def from_main(self, value: Any) -> Any:
        """What rank 0 holds, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]


ALONE = World()


def is_launched() -> bool:
    """Whether a launcher (ours, torchrun or a cluster's) has made this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined() -> Iterator[World]:
    """The world that the launcher's environment names, joined and left again."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        local_rank = 0 if torch.cuda.device_count() == 1 else local_rank  # some clusters show a rank its own GPU only
        if local_rank >= torch.cuda.device_count():
            raise InputError("more processes than GPUs", local_rank + 1, f"at most {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, host_group)
    finally:
        gc.collect()  # a wrapper that outlives the group aborts the interpreter at its exit
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


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


def launch(num: int, module: str, argument: str) -> int | None:
    """Run `python -m module argument` as `num` ranks on this machine and return their exit code.

    None where a signal ended them: SIGINT, SIGTERM and SIGHUP are passed on, SIGUSR1 as SIGTERM, and the ranks get the
    time to save. A rank that dies takes the others with it within seconds.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        run_id=f"cm-train-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port each: two jobs on one machine don't meet
        local_addr="localhost",
        max_restarts=0,
    )
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds that a save may take after a signal
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in caught}
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        elastic_launch(config, sys.executable)("-m", module, argument)
    except SignalException:
        return None
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return 2 if codes and all(code in (2, -signal.SIGTERM) for code in codes) and 2 in codes else 1
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def leave(code: int) -> NoReturn:
    """End a rank at once with `code`: gloo's threads abort about every other interpreter that waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, however that ended (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
