import gc
import threading

import torch

from cm_train.models.checkpoints import write as saving
from cm_train.models.checkpoints.host_memory import HostMemory


def tree():
    base = torch.arange(24.0).view(2, 3, 2, 2)
    return {
        "weights": {"conv": base.to(memory_format=torch.channels_last), "bias": torch.ones(3)},
        "state": {"count": torch.zeros((), dtype=torch.float64), "none": torch.empty(0), "step": 3},
        "view": base.flatten()[4:7],
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def tensors(value):
    return [t for v in value.values() for t in tensors(v)] if isinstance(value, dict) else [value]


def test_a_copy_has_the_values_and_the_order_in_memory_of_its_moment():
    original, memory = tree(), HostMemory()
    copy = memory.copy(original)
    assert same(copy, tree())
    assert copy["weights"]["conv"].stride() == original["weights"]["conv"].stride()
    original["weights"]["bias"].zero_()
    assert same(copy, tree())
    again = memory.copy(original)
    assert again["weights"]["bias"].sum() == 0
    assert again["weights"]["conv"].data_ptr() == copy["weights"]["conv"].data_ptr()  # one at a time, in one block


def test_every_tensor_of_a_copy_has_a_storage_of_its_own_size():
    """torch.save writes the storage, not the tensor: a view of the copies' block would carry all of it."""
    copies = [t for t in tensors(HostMemory().copy(tree())) if isinstance(t, torch.Tensor)]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in copies)
    assert all(t.data_ptr() % 64 == 0 for t in copies if t.numel())


def test_state_of_a_view_is_written_without_what_it_is_a_view_of(tmp_path):
    big = torch.zeros(1_000_000)
    torch.save(saving._whole({"a": {"b": big[:10]}}), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 10_000


def test_memory_that_was_never_needed_can_be_given_back():
    memory = HostMemory()
    memory.reserve(tree())
    memory.release()
    assert same(memory.copy(tree()), tree())


class FakeCudart:
    """Counts what is pinned."""

    def __init__(self, error=0):
        self.pinned, self.error, self.threads = {}, error, set()

    def cudaHostRegister(self, pointer, size, flags):
        assert size > 0
        self.threads.add(threading.current_thread())
        if not self.error:
            self.pinned[pointer] = size
        return self.error

    def cudaHostUnregister(self, pointer):
        del self.pinned[pointer]


def on_gpu(monkeypatch, cudart):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_gpus_tensors_go_through_one_block_that_is_pinned_once(monkeypatch):
    cudart, memory = FakeCudart(), HostMemory()
    on_gpu(monkeypatch, cudart)
    memory.reserve(tree())
    first = memory.copy(tree())
    assert len(cudart.pinned) == 1
    block = next(iter(cudart.pinned))
    assert same(memory.copy(tree() | {"a little more": torch.ones(3)}), tree() | {"a little more": torch.ones(3)})
    assert [*cudart.pinned] == [block]  # the numbers that come and go fit too
    assert first["weights"]["conv"].data_ptr() == block
    memory.copy({"more": torch.zeros(100_000)})
    assert len(cudart.pinned) == 1
    memory.release()
    assert not cudart.pinned
    assert threading.current_thread() not in cudart.threads  # where it fails, the next kernel of that thread fails too


def test_memory_is_unpinned_however_it_goes(monkeypatch):
    """A KeyboardInterrupt passes by whoever would release it."""
    cudart, memory = FakeCudart(), HostMemory()
    on_gpu(monkeypatch, cudart)
    copy = memory.copy(tree())
    assert cudart.pinned
    del memory
    assert same(copy, tree())
    del copy
    gc.collect()
    assert not cudart.pinned


def test_memory_that_can_not_be_pinned_serves_too(monkeypatch):
    memory = HostMemory()
    on_gpu(monkeypatch, FakeCudart(error=2))
    assert same(memory.copy(tree()), tree())
    memory.release()
