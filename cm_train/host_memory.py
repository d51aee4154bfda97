"""Copies of a run's tensors in the host's memory: one block, pinned where a GPU copies into it, kept between saves."""

import threading
from collections.abc import Iterator, Mapping
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
        self._pinned = False
        self._reserving: threading.Thread | None = None

    def reserve(self, tree: Any) -> None:
        """Have memory for a copy of `tree` made ready beside whatever goes on."""
        if any(t.is_cuda for t in _tensors(tree)):
            size = _num_bytes(tree) + _SLACK
            self._reserving = threading.Thread(target=self._try_pin, args=(size,), name="pin", daemon=True)
            self._reserving.start()

    def copy(self, tree: Any) -> Any:
        """`tree` as it is at this moment, each tensor on the CPU with a storage of its own size.

        Where a GPU's tensors are copied, the copy before must not be in use any more.

        Raises:
            RuntimeError: the memory does not suffice.
        """
        self._wait()
        size, on_gpu = _num_bytes(tree), any(t.is_cuda for t in _tensors(tree))
        if on_gpu and (self._block is None or self._block.numel() < size):
            self._pin(size)
        block = self._block if on_gpu else torch.empty(size, dtype=torch.uint8)
        assert block is not None
        copies = _copied(tree, block.numpy().data, [0])
        if on_gpu:
            torch.cuda.synchronize()  # all copies are queued before the one wait
        return copies

    def release(self) -> None:
        """Give the memory back."""
        self._wait()
        if self._pinned and self._block is not None:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        self._block, self._pinned = None, False

    def _wait(self) -> None:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def _try_pin(self, size: int) -> None:
        try:
            self._pin(size)
        except RuntimeError:  # `copy` tries again, and tells
            self._block = None

    def _pin(self, size: int) -> None:
        if self._pinned and self._block is not None:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        self._pinned = False
        # Not pin_memory=True, which rounds up to a power of two: 16 GB for 9.
        self._block = torch.empty(size, dtype=torch.uint8)
        error = torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), size, 0)
        self._pinned = int(error) == 0  # memory that can't be pinned serves too, at half the speed


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
