"""The loader: which images a step holds, whoever asks and however the rows are shared out."""

import functools
import gc
import itertools
import operator
import threading
import weakref

import pytest
import torch

from cm_train.data.datasets.base import Dataset
from cm_train.data.datasets.in_memory import InMemory
from cm_train.data.loader import Loader


class Lazy(Dataset):
    """Image i is all i; counts what is gathered, and on which thread."""

    image_size, channels, class_names, hflip, lazy = 2, 1, ["a", "b"], False, True

    def __init__(self, size=10):
        self.size, self.calls = size, []

    def __len__(self):
        return self.size

    def gather(self, index):
        self.calls.append((index.tolist(), threading.current_thread().name))
        return index.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), index % 2

    def fingerprint(self):
        return ""


def held(size=10, labels=True):
    images = torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return InMemory(images, torch.arange(size) % 2 if labels else None, ["a", "b"])


def items(loader, step, rows=None):
    return loader.batch_at(step, rows or range(loader.batch_size))[0][:, 0, 0, 0].tolist()


def stream(loader, steps):
    return [item for step in range(steps) for item in items(loader, step)]


@pytest.mark.parametrize("dataset", [held, Lazy])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 13, 35])
def test_loader_gives_every_image_once_an_epoch(dataset, batch_size):
    seen = stream(Loader(dataset(), seed=0, batch_size=batch_size), 70 // batch_size + 1)
    epochs = [seen[start : start + 10] for start in range(0, 70, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 7  # each in an order of its own


def test_loader_batch_size_only_cuts_the_stream():
    streams = [stream(Loader(held(), 3, batch_size), 60 // batch_size) for batch_size in (1, 4, 12, 30)]
    assert all(other == streams[0] for other in streams)


@pytest.mark.parametrize("dataset", [held, Lazy])
@pytest.mark.parametrize("cuts", [(0, 12, 24), (0, 1, 2, 24), (0, 8, 16, 24)])
def test_loader_rows_do_not_depend_on_how_they_are_split(dataset, cuts):
    loader, whole = Loader(dataset(), 0, 24), Loader(held(), 0, 24)
    for step in (0, 1, 2, 7):
        parts = [items(loader, step, range(a, b)) for a, b in itertools.pairwise(cuts)]
        assert functools.reduce(operator.iadd, parts, []) == items(whole, step)


@pytest.mark.parametrize("dataset", [held, Lazy])
def test_loader_does_not_depend_on_history(dataset):
    used = Loader(dataset(), 0, 7)
    for step in (0, 1, 2, 9, 3, 3, 0):
        items(used, step)
    for step in (5, 0, 100):
        assert items(used, step) == items(Loader(dataset(), 0, 7), step)


def test_loader_order_depends_on_the_seed():
    orders = [tuple(stream(Loader(held(100), seed, 50), 2)) for seed in (0, 1, 2**32, 2**32 + 1)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("dataset", [held, Lazy])
def test_loader_labels_belong_to_their_images(dataset):
    images, labels = Loader(dataset(), 0, 25).batch_at(3, range(5, 20))
    assert images.shape == (15, 1, 2, 2) and labels is not None
    assert labels.tolist() == [i % 2 for i in images[:, 0, 0, 0].tolist()]


def test_loader_gives_no_labels_for_a_set_without():
    assert Loader(held(labels=False), 0, 4).batch_at(0, range(4))[1] is None


def test_loader_fetches_the_next_step_of_a_lazy_set_ahead():
    dataset = Lazy()
    loader = Loader(dataset, 0, 4)
    for step in range(6):
        for rows in (range(2), range(2, 4)):
            items(loader, step, rows)
    for future in loader._ahead.values():
        future.result()
    ahead = [index for index, name in dataset.calls if name.startswith("loader")]
    direct = [index for index, name in dataset.calls if not name.startswith("loader")]
    assert len(direct) == 2 and len(ahead) == 12  # only the first step was waited for, and nothing came twice


def test_loader_of_a_held_set_starts_no_thread():
    before = set(threading.enumerate())  # a count would also see another test's last thread end
    items(Loader(held(), 0, 4), 0)
    assert not set(threading.enumerate()) - before


def test_loader_forgets_what_it_fetched_ahead_after_a_jump():
    loader = Loader(Lazy(), 0, 4)
    for step in range(0, 100, 10):
        items(loader, step)
    assert len(loader._ahead) == 1


def test_loader_raises_a_late_error_at_the_step_that_needs_it():
    bad = Loader(held(), 0, 4).index_at(1, range(4)).tolist()

    class Bad(Lazy):
        def gather(self, index):
            if index.tolist() == bad:
                raise ValueError("broken")
            return super().gather(index)

    loader = Loader(Bad(), 0, 4)
    items(loader, 0)
    with pytest.raises(ValueError, match="broken"):
        items(loader, 1)
    items(loader, 2)


def test_a_loader_and_its_data_are_gone_with_the_last_reference():
    """Not with the next collection of cycles: what it holds may fill a GPU."""
    gc.collect()
    gc.disable()
    try:
        loader = Loader(held(5), seed=0, batch_size=3)
        loader.batch_at(0, range(3))
        gone = weakref.ref(loader)
        del loader
        assert gone() is None
    finally:
        gc.enable()
