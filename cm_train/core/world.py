"""Ranks: who this process is among them, what they agree on, and what they make of one that is gone."""

import fcntl
import gc
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from .errors import InputError
from .launched import STORE, place
from .signals import Stopped
from .waiting import Watch

_ROLL_CALL_S = 5.0
_EXCHANGED_BYTES = 1 << 28  # of each rank, in one go
_FOR_EVER = timedelta(days=100)  # the libraries' timeout, where `Watch` looks at the clock

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another rank is gone or silent; `is_speaker` on the one rank that should say so."""

    def __init__(self, message: str, is_speaker: bool):
        super().__init__(message)
        self.is_speaker = is_speaker


@dataclass(frozen=True)
class World:
    """This process among all that train one run together; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host_group: Any = None  # for what the hosts agree on, past the devices' queues
    store: Any = None  # a few words that outlive a broken group
    watch: Watch | None = None

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
            with self.waiting():
                dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether any rank says yes; the same answer on every rank."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        with self.waiting():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.host_group)
        return votes.bool().tolist()

    def decide(self, choose: Callable[[], Any]) -> Any:
        """What rank 0 chooses, on every rank. Raises its InputError or Stopped on every rank too."""
        if self.size == 1:
            return choose()
        answer: tuple[str, Any, bool] = "", None, False
        if self.is_main:
            try:
                answer = "", choose(), False
            except InputError as error:
                answer = str(error), None, False
            except Stopped:
                answer = "", None, True
        message, value, stopped = self.from_main(answer)
        if message:
            raise InputError(message)
        if stopped:
            raise Stopped
        return value

    def agree(self, work: Callable[[], T]) -> T:
        """What `work` returns here. Raises the first rank's InputError on every rank where any rank meets one.

        So it does with Stopped, where no rank has worse to say.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        trouble, stopped = "", False
        try:
            result = work()
        except InputError as error:
            trouble = str(error) or "wrong input"
        except Stopped:
            stopped = True
        has_trouble, has_stopped = self.any(bool(trouble), stopped)
        if has_trouble:
            raise InputError(self.first_of(trouble))
        if has_stopped:
            raise Stopped
        return cast(T, result)

    def first_of(self, message: str) -> str:
        """The message of the lowest rank that has one."""
        if self.size == 1:
            return message
        messages: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(messages, message, group=self.host_group)
        return next((m for m in messages if m), "")

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank's CPU tensor [N, ...], concatenated in order of rank, on rank 0; `values` elsewhere."""
        if self.size == 1:
            return values
        parts: list[Any] | None = [None] * self.size if self.is_main else None
        with self.waiting():
            dist.gather_object(values, parts, dst=0, group=self.host_group)
        return values if parts is None else torch.cat(parts)

    def exchange_(self, rows: torch.Tensor) -> None:
        """Give every rank all rows of a CPU tensor [N, ...], of which each has its own N / size in their place."""
        if self.size == 1:
            return
        parts = list(rows.chunk(self.size))
        each = max(1, _EXCHANGED_BYTES // max(1, rows[0].nbytes))  # rows at once
        for start in range(0, len(parts[0]), each):
            some = [part[start : start + each] for part in parts]
            with self.waiting():
                dist.all_gather(some, some[self.rank].clone(), group=self.host_group)

    def from_main(self, value: Any) -> Any:
        """What rank 0 holds, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self.waiting():
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def waiting(self) -> AbstractContextManager[None]:
        """Around whatever waits for other ranks; they are given up when that takes too long."""
        return nullcontext() if self.watch is None else self.watch.waiting()

    def check_peers(self, error: Exception) -> None:
        """Raise RankLost where `error` comes of another rank's silence, with the names of those that don't answer."""
        words = str(error).lower()
        if isinstance(error, RuntimeError) and ("gloo" in words or "nccl" in words or "connection" in words):
            raise self.lost(str(error).splitlines()[0]) from error

    def lost(self, reason: str) -> RankLost:
        """What to raise when other ranks are silent; `reason` where none of them can be named."""
        if self.store is None:
            return RankLost(f"rank {self.rank} of {self.size} did not meet the others: {reason}", self.local_rank == 0)
        missing = set(range(self.size))
        with suppress(Exception):  # where the store's own host is gone, nobody can be asked
            self.store.set(f"here-{self.rank}", "1")
            deadline = time.monotonic() + _ROLL_CALL_S
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not self.store.check([f"here-{rank}"])}
                time.sleep(0.1)
        present = sorted(set(range(self.size)) - missing)
        if not missing or not present:
            return RankLost(f"the ranks lost each other: {reason}", self.is_main)
        names = f"rank {min(missing)}" if len(missing) == 1 else f"ranks {', '.join(map(str, sorted(missing)))}"
        return RankLost(f"{names} of {self.size} died or hangs, so the job ends", self.rank == present[0])

    def is_first_to_fail(self) -> bool:
        """Whether no other rank has failed by an error of its own before; that one has the cause."""
        with suppress(Exception):
            return self.store.add("failed", 1) == 1
        return True


ALONE = World()


def is_launched() -> bool:
    """Whether a launcher has made this process a rank. Raises InputError, see `launched.place`."""
    return place() is not None


@contextmanager
def joined(give_up: Callable[[RankLost], Any]) -> Iterator[World]:
    """The world that the launcher's environment names, joined and left again.

    Args:
        give_up: called, from another thread, when the others have been silent for too long; ends this process.

    Raises:
        InputError: this machine has fewer GPUs than ranks.
        RankLost: the others can't be met.
    """
    here = place()
    assert here is not None, "nobody has started ranks"
    rank, size, local_rank, patience_s = here.rank, here.size, here.local_rank, here.patience_s
    if torch.cuda.is_available():
        local_rank = 0 if torch.cuda.device_count() == 1 else local_rank  # some clusters show a rank its own GPU only
        if local_rank >= torch.cuda.device_count():
            raise InputError("more processes than GPUs", local_rank + 1, f"at most {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    world = World(rank, size, local_rank)
    watch = Watch(patience_s, lambda: give_up(world.lost("they are silent")))
    with watch.waiting():
        store = _store(rank, size, timedelta(seconds=patience_s))
        world = World(rank, size, local_rank, None, store)
        # A hung device's host goes on until it needs the device: that wait is NCCL's to end.
        on_gpus = torch.cuda.is_available()
        longest = timedelta(seconds=1.2 * patience_s) if on_gpus else _FOR_EVER
        dist.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=size, timeout=longest)
        host_group = dist.new_group(backend="gloo", timeout=_FOR_EVER)
    world = World(rank, size, local_rank, host_group, store, watch)
    yield world
    gc.collect()  # a wrapper that outlives the group aborts the interpreter at its exit
    dist.destroy_process_group()


def _chosen_address(host: str) -> str | None:
    """The address of the interface that GLOO_SOCKET_IFNAME names, where `host` is that one; None: every address."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    get_address = 0x8915  # SIOCGIFADDR of linux/sockios.h
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        found = fcntl.ioctl(any_socket, get_address, struct.pack("256s", interface.encode()[:15]))
        address = socket.inet_ntoa(found[20:24])
        if address in socket.gethostbyname_ex(host)[2]:
            return address
    return None


def _store(rank: int, size: int, patience: timedelta) -> Any:
    """Where the ranks meet. Raises RankLost where they don't."""
    if STORE in os.environ:
        return dist.FileStore(os.environ[STORE], size)
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        address = _chosen_address(host) if rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ else None
        if address is None:
            store, *_ = next(dist.rendezvous("env://", timeout=patience))
        else:
            held = socket.create_server((address, int(port)))
            store = dist.TCPStore(host, int(port), size, True, patience, False, True, held.detach())
    except (dist.DistError, OSError) as error:
        where = f"{host}:{port}"
        reason = str(error).splitlines()[0]
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        raise RankLost(f"the nodes did not meet at {where}: {reason}", speaks) from error
    # Whoever starts ranks again may keep the store, in which those of the first time have left their names.
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
