"""Copies of a run's tensors in the host's memory: one block, kept between saves, pinned where a GPU copies into it."""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 64  # bytes
_SLACK = 2**16  # bytes, for the few numbers that come and go from one save to the next


class HostMemory:
    """Room for one copy of nested dicts of tensors at a time: one block, kept from copy to copy.

    Memory that was never touched, and all the more memory that is to be pinned for a GPU, takes a second for each few
    gigabytes to be had. So it is had once, by a thread that `reserve` starts.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._unpin: Callable[[], object] = lambda: None
        self._making: threading.Thread | None = None

    def reserve(self, tree: Any) -> None:
        """Have memory for copies of `tree` made ready beside whatever goes on."""
        self._start_making(tree)

    def copy(self, tree: Any) -> Any:
        """`tree` as it is at this moment, each tensor on the CPU with a storage of its own size.

        The copy before must not be in use any more.

        Raises:
            RuntimeError: the memory does not suffice.
        """
        self._wait()
        size = _num_bytes(tree)
        if self._block is None or self._block.numel() < size:
            self._start_making(tree)
            self._wait()
        if self._block is None:
            raise RuntimeError(f"no memory for a copy of {size / 2**30:.2f} GiB")
        copies = _copied(tree, self._block.numpy().data, [0])
        if _on_gpu(tree):
            torch.cuda.synchronize()  # all copies are queued before the one wait
        return copies

    def release(self) -> None:
        """Give the memory back, once nobody writes from it any more."""
        self._wait()
        self._unpin()
        self._block = None

    def _wait(self) -> None:
        if self._making is not None:
            self._making.join()
            self._making = None

    def _start_making(self, tree: Any) -> None:
        # Always in a thread: CUDA keeps an error for the next kernel that its thread launches, and training goes on.
        size = _num_bytes(tree) + _SLACK
        self._making = threading.Thread(target=self._make, args=(size, _on_gpu(tree)), name="host memory", daemon=True)
        self._making.start()

    def _make(self, size: int, pinned: bool) -> None:
        self._unpin()
        self._block = None
        try:
            # Not pin_memory=True, which rounds up to a power of two: 16 GB for 9.
            self._block = block = torch.empty(size, dtype=torch.uint8)
        except RuntimeError:  # `copy` tells
            return
        if not pinned:
            block.zero_()  # touches each page
            return
        pointer, cudart = block.data_ptr(), torch.cuda.cudart()
        if int(cudart.cudaHostRegister(pointer, size, 0)) == 0:  # what can't be pinned serves too, at half the speed
            # However the block goes: memory that is given back while CUDA holds it would be copied to where it was.
            self._unpin = weakref.finalize(block, cudart.cudaHostUnregister, pointer)


def _on_gpu(tree: Any) -> bool:
    return any(t.is_cuda for t in _tensors(tree))


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
