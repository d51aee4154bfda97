"""Which images make up which training step: a pure function of (seed, step, row)."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..core import rng
from .datasets.base import Dataset

Images = tuple[Tensor, Tensor | None]  # uint8 [B, C, H, W] in [0, 255]; their labels, int64 [B], where there are any


class Loader:
    """The endless stream of a data set's epochs, each in an order of its own, cut into steps.

    Row j of step k is item k * batch_size + j of the stream, however the rows are shared out and wherever a run
    starts. A batch may straddle epochs and may be larger than the data set.

    Args:
        dataset: what `dataset.to(device)` has prepared.
        seed: the key of the orders.
        batch_size: images a step over all ranks, at least 1.
        versions: how orders are drawn, see `rng.NEWEST`.
    """

    def __init__(self, dataset: Dataset, seed: int, batch_size: int, versions: rng.Versions = rng.NEWEST):
        self._order_version = versions["order"]
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self._orders: dict[int, Tensor] = {}  # of the last epochs
        self._ahead: dict[tuple[int, range], Future[Images]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader") if dataset.lazy else None

    def batch_at(self, step: int, rows: range) -> Images:
        """Images and labels of `rows` of the global batch of `step`, on the device of the data set.

        Args:
            step: 0, 1, 2, ...
            rows: consecutive positions in [0, batch_size).

        Returns:
            uint8 [len(rows), C, H, W] in [0, 255]; int64 [len(rows)], or None for a set without labels.
        """
        assert step >= 0 and rows.step == 1 and 0 <= rows.start < rows.stop <= self.batch_size
        images, labels = self._gather(step, rows)
        device = self.dataset.device
        images = images.to(device, non_blocking=True)
        return images, None if labels is None else labels.to(device, non_blocking=True)

    def index_at(self, step: int, rows: range) -> Tensor:
        """The indices in the data set that `batch_at` gathers; int64 [len(rows)] on the CPU."""
        size = len(self.dataset)
        position, end = (step * self.batch_size + row for row in (rows.start, rows.stop))
        parts = []
        while position < end:
            epoch, offset = divmod(position, size)
            parts.append(self._order(epoch)[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def first(self, num: int) -> Tensor:
        """The indices of the first `num` images of the stream, or of all where the set has fewer; int64 on the CPU."""
        return self._order(0)[:num]

    def _gather(self, step: int, rows: range) -> Images:
        if self._thread is None:
            return self.dataset.gather(self.index_at(step, rows))
        for old in [key for key in self._ahead if key[0] not in (step, step + 1)]:  # the caller has jumped
            self._ahead.pop(old).cancel()
        ready = self._ahead.pop((step, rows), None)
        # Asked for before waiting, so that the thread never idles between two steps.
        if (step + 1, rows) not in self._ahead:
            index = self.index_at(step + 1, rows)
            self._ahead[step + 1, rows] = self._thread.submit(self.dataset.gather, index)
        return self.dataset.gather(self.index_at(step, rows)) if ready is None else ready.result()

    def _order(self, epoch: int) -> Tensor:
        # A batch touches two epochs at most unless it is larger than the set, and then the set is small. Not lru_cache
        # on the method: the loader and its cache would hold each other, and their data, until the next collection.
        if epoch not in self._orders:
            if len(self._orders) == 2:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = rng.permutation(self.seed, "order", epoch, len(self.dataset), self._order_version)
        return self._orders[epoch]
