"""Memory: how much this process takes, and running out of it: told from other errors, and said in one line."""

import contextlib
import re
from collections.abc import Iterator

import torch

from .errors import OutOfMemory
from .free_memory import resident_bytes

# What CUDA's libraries say where torch's own allocator isn't the one that fails.
_OF_CUDA = re.compile(
    r"CUDA error: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED|Triton Error \[CUDA\]: out of memory|"
    r"Cuda failure 2 'out of memory'"
)


def needed_memory(error: BaseException) -> str | None:
    """What was asked for and what there was, where `error` says that memory ran out; None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ... of which ... is free. ..."
        parts = re.findall(r"Tried to allocate [\d.]+ \w+|GPU \d+ has a total capacity of .*? is free", text)
        return "; ".join(parts) or "no device memory left"
    if isinstance(error, MemoryError):
        return text or "no memory left"
    if not isinstance(error, RuntimeError):
        return None
    if text == "can't start new thread":  # Python has no type of its own for it, nor torch for these
        return "no memory left for a thread"
    if "DefaultCPUAllocator" in text:
        tried = re.search(r"tried to allocate (\d+) bytes", text)
        return f"tried to allocate {int(tried[1]) / 2**30:.2f} GiB" if tried else "no memory left"
    found = _OF_CUDA.search(text)
    return f"{found[0]}, no device memory left" if found else None


def taken_gib(device: torch.device) -> float:
    """The most that was allocated on a GPU since this was last asked; on a CPU what this process holds now. In GiB."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    return resident_bytes() / 2**30


@contextlib.contextmanager
def shortage_explained(doing: str, fix: str) -> Iterator[None]:
    """A context whose memory errors become OutOfMemory, which says `doing` what it happened, and how to mend it."""
    try:
        yield
    except Exception as error:
        needed = needed_memory(error)
        if needed is None:
            raise
        raise OutOfMemory(doing, needed, fix) from error
