"""How ranks meet: at a file of one machine, or at a port of the first of several."""

import fcntl
import gc
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import InputError
from .launched import STORE, place
from .waiting import Watch
from .world import RankLost, World

_FOR_EVER = timedelta(days=100)  # the libraries' timeout, where `Watch` looks at the clock


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
