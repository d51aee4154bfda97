"""Copies of a run's tensors in the host's memory: one block, pinned where a GPU copies into it, kept between saves."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 64  # bytes
_SLACK = 2**16  # bytes, for the few numbers that come and go from one save to the next


class HostMemory:
    """Room for one copy of nested dicts of tensors at a time.

    Pinning memory takes a second for each few gigabytes, so one block is pinned once, by a thread that `reserve`
    starts, and used by every copy. Without a GPU there is nothing to pin, and each copy has memory of its own.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._unpin: Callable[[], object] = lambda: None
        self._pinning: threading.Thread | None = None

    def reserve(self, tree: Any) -> None:
        """Have memory for a copy of `tree` made ready beside whatever goes on."""
        if any(t.is_cuda for t in _tensors(tree)):
            self._start_pinning(_num_bytes(tree) + _SLACK)

    def copy(self, tree: Any) -> Any:
        """`tree` as it is at this moment, each tensor on the CPU with a storage of its own size.

        Where a GPU's tensors are copied, the copy before must not be in use any more.

        Raises:
            RuntimeError: the memory does not suffice.
        """
        self._wait()
        size, on_gpu = _num_bytes(tree), any(t.is_cuda for t in _tensors(tree))
        if on_gpu and (self._block is None or self._block.numel() < size):
            self._start_pinning(size + _SLACK)
            self._wait()
        block = self._block if on_gpu else torch.empty(size, dtype=torch.uint8)
        if block is None:
            raise RuntimeError(f"no memory for a copy of {size / 2**30:.2f} GiB")
        copies = _copied(tree, block.numpy().data, [0])
        if on_gpu:
            torch.cuda.synchronize()  # all copies are queued before the one wait
        return copies

    def release(self) -> None:
        """Give the memory back, once nobody writes from it any more."""
        self._wait()
        self._unpin()
        self._block = None

    def _wait(self) -> None:
        if self._pinning is not None:
            self._pinning.join()
            self._pinning = None

    def _start_pinning(self, size: int) -> None:
        # Always in a thread: CUDA keeps an error for the next kernel that its thread launches, and training goes on.
        self._pinning = threading.Thread(target=self._pin, args=(size,), name="pin", daemon=True)
        self._pinning.start()

    def _pin(self, size: int) -> None:
        self._unpin()
        self._block = None
        try:
            # Not pin_memory=True, which rounds up to a power of two: 16 GB for 9.
            self._block = block = torch.empty(size, dtype=torch.uint8)
        except RuntimeError:  # `copy` tells
            return
        pointer, cudart = block.data_ptr(), torch.cuda.cudart()
        if int(cudart.cudaHostRegister(pointer, size, 0)) == 0:  # what can't be pinned serves too, at half the speed
            # However the block goes: memory that is given back while CUDA holds it would be copied to where it was.
            self._unpin = weakref.finalize(block, cudart.cudaHostUnregister, pointer)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, Tensor):
        yield tree


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def _num_bytes(tree: Any) -> int:
    return sum(_room(t) for t in _tensors(tree))


def _copied(tree: Any, block: memoryview, used: list[int]) -> Any:
    """`tree` with its tensors copied one after another into `block`, from byte `used[0]` on."""
    if isinstance(tree, Mapping):
        return {key: _copied(value, block, used) for key, value in tree.items()}
    if not isinstance(tree, Tensor):
        return tree
    tensor = tree.detach()
    if tensor.numel() == 0:
        return tensor.cpu()
    start, used[0] = used[0], used[0] + _room(tensor)
    # A storage of its own: who saves a tensor saves its storage, the whole block otherwise.
    flat = torch.frombuffer(block[start : start + tensor.nbytes], dtype=tensor.dtype)
    # In the same order in memory, so that a copy off the device is one transfer.
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    back = [order.index(i) for i in range(tensor.ndim)]
    copy = flat.view([tensor.shape[i] for i in order]).permute(back)
    return copy.copy_(tensor, non_blocking=True)
