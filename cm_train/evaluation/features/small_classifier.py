"""A small classifier of a data set's own images: its labels and features judge generated ones without a download."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.progress import progress
from ...core.rng import key, permutation
from ...core.signals import heed
from ...data.pixels import to_unit_range


class Classifier(nn.Module):
    """Two convolutional stages and a hidden layer of 64 features, for images [B, C, H, W] of 8 to 64 pixels a side."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, num_classes)

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Penultimate features of uint8 images [N, C, H, W]; float32 [N, 64]."""
        return torch.cat([self.body(to_unit_range(chunk)) for chunk in images.split(batch_size)])

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """The most likely class of uint8 images [N, C, H, W]; int64 [N]."""
        return self.head(self.features(images)).argmax(1)


def train_classifier(
    images: Tensor, labels: Tensor, seed: int = 0, epochs: int = 30, batch_size: int = 64
) -> Classifier:
    """A classifier of uint8 images [N, C, H, W] with labels [N], frozen; the same for the same arguments.

    Raises:
        Stopped: see `signals.heed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "classifier"))
        model = Classifier(images.shape[1], int(labels.max()) + 1)
        steps = epochs * (len(images) // batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        x = to_unit_range(images)
        with progress(steps, "training a classifier, steps") as bar:
            for epoch in range(epochs):
                order = permutation(seed, "classifier-order", epoch, len(images))
                for index in order[: len(images) // batch_size * batch_size].split(batch_size):
                    heed()
                    loss = F.cross_entropy(model.head(model.body(x[index])), labels[index])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.advance()
    return model.requires_grad_(False).eval()
