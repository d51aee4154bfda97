"""How much memory this process may still take, and giving back what it needs no more."""

import ctypes
import gc
import os
import resource
from contextlib import suppress
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, num_sharing: int = 1) -> int:
    """Bytes that are free on `device`; on a CPU the least of what machine, cgroup and ulimit leave.

    Args:
        num_sharing: processes of this run on the machine, which share what it has; not their own limits.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    shared = [left for left in (_of_machine(), *_of_cgroups()) if left is not None]
    own = _of_limit()
    each = min(shared, default=2**62) // num_sharing
    return max(0, each if own is None else min(each, own))


def resident_bytes(peak: bool = False) -> int:
    """What this process holds in memory, or held at most."""
    found = _fields(Path("/proc/self/status")).get("VmHWM" if peak else "VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else found  # macOS: bytes, its peak


def give_back() -> None:
    """Let go of what a run held that is over: a teacher and its student are two runs of one process."""
    gc.collect()  # networks and hooks refer to each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc's alone, which keeps what lies between two pieces in use
        ctypes.CDLL(None).malloc_trim(0)


def _of_machine() -> int | None:
    fields = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in fields:
        return fields["MemAvailable"]
    with suppress(ValueError, OSError):  # half of all there is, where nobody says what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _of_cgroups() -> list[int]:
    """What each limit of a control group that this process is in leaves, in either version of those."""
    left = []
    for folder, most, used in _groups():
        with suppress(OSError, ValueError):  # no limit is "max", or a number without meaning
            left.append(int((folder / most).read_text()) - int((folder / used).read_text()))
    return left


def _groups() -> list[tuple[Path, str, str]]:
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                home, names = _CGROUPS, ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                home, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            inner = home / path.lstrip("/")
            found += [(folder, *names) for folder in (inner, *inner.parents) if folder.is_relative_to(home)]
    return found


def _of_limit() -> int | None:
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return None
    return most - _fields(Path("/proc/self/status")).get("VmSize", 0)


def _fields(path: Path) -> dict[str, int]:
    """The sizes, in bytes, that a file of /proc gives in kB."""
    sizes = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                sizes[name] = int(value[: -len(" kB")]) * 1024
    return sizes
