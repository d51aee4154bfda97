"""Ranks: who this process is among them, what they agree on, and what they make of one that is gone."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from .errors import InputError
from .launched import place
from .signals import Stopped
from .waiting import Watch

_ROLL_CALL_S = 5.0
_EXCHANGED_BYTES = 1 << 28  # of each rank, in one go

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
        """This rank's GPU, or the CPU where there is none."""
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

    def any_rank(self, *flags: bool) -> list[bool]:
        """For each flag whether any rank says yes; the same answer on every rank."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        with self.waiting():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.host_group)
        return votes.bool().tolist()

    def largest(self, value: float) -> float:
        """The largest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64)
        with self.waiting():
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.host_group)
        return values.item()

    @property
    def num_here(self) -> int:
        """How many of the ranks are on this machine, as far as the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def run_on_main(self, choose: Callable[[], Any]) -> Any:
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
        message, value, stopped = self.broadcast(answer)
        if message:
            raise InputError(message)
        if stopped:
            raise Stopped
        return value

    def run_on_all(self, work: Callable[[], T]) -> T:
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
        has_trouble, has_stopped = self.any_rank(bool(trouble), stopped)
        if has_trouble:
            raise InputError(self.first_message(trouble))
        if has_stopped:
            raise Stopped
        return cast(T, result)

    def first_message(self, message: str) -> str:
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

    def broadcast(self, value: Any) -> Any:
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
