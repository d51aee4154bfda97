"""The data set that is held in memory whole."""

import torch
from torch import Tensor

from .. import fingerprint
from .base import Dataset


class InMemory(Dataset):
    """A set whose images are one tensor.

    Args:
        images: uint8 [N, C, S, S], N > 0.
        labels: int64 [N], or None.
        class_names: one name a label; ignored where `labels` is None.
        hflip: see Dataset.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, class_names: list[str], hflip: bool = False):
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[2] == images.shape[3]
        assert len(images) > 0 and (labels is None or labels.shape == (len(images),))
        self.images, self.labels = images.contiguous(), labels
        self.channels, self.image_size = images.shape[1:3]
        self.class_names = [] if labels is None else class_names
        self.hflip = hflip

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        at_home = self.images.device.type == "cpu"
        if not at_home:
            index = self._host(index).to(self.images.device, non_blocking=True)
        images, labels = self.images[index], None if self.labels is None else self.labels[index]
        if not at_home:
            return images, labels
        return self._host(images), None if labels is None else self._host(labels)

    def to(self, device: torch.device | str) -> "InMemory":
        """Move to `device`, unless the images would take more than a third of its free memory."""
        super().to(device)
        if self.device.type != "cuda" or self.images.nbytes <= torch.cuda.mem_get_info(self.device)[0] // 3:
            self.images = self.images.to(self.device)
            self.labels = None if self.labels is None else self.labels.to(self.device)
        return self

    def relabelled(self, class_names: list[str], labels: Tensor) -> "InMemory":
        """The same images under other labels, int64 [N]."""
        other = InMemory(self.images, labels.to(self.images.device), class_names, self.hflip)
        other.device = self.device
        return other

    def all_labels(self) -> Tensor | None:
        return self.labels

    def fingerprint(self) -> str:
        return fingerprint.of_pixels(tuple(self.images.shape), [self.images], self.labels)
