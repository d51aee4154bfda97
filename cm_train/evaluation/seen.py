"""What an extractor sees in images: a row of numbers for each, by which sets of images are compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..core.precision import arithmetic
from ..core.progress import Progress
from ..core.signals import heed
from .features.base import Extractor


@dataclass(frozen=True)
class Seen:
    """Of N images.

    Attributes:
        features: float32 [N, D].
        logits: of the classes that the extractor knows, float32 [N, K]; None where it knows none.
    """

    features: Tensor
    logits: Tensor | None

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, index: Tensor) -> Self:
        """Of some of the images, int64 [M]."""
        return type(self)(self.features[index], None if self.logits is None else self.logits[index])


def look(extractor: Extractor, batches: Iterable[Tensor], bar: Progress | None = None) -> Seen:
    """What `extractor` sees in uint8 images [B, C, H, W], batch by batch.

    Args:
        bar: moves on by the images that were looked at.

    Raises:
        Stopped: see `signals.heed`.
    """
    features: list[Tensor] = []
    logits: list[Tensor] = []
    for images in batches:
        for some in images.split(extractor.batch_size):
            heed()
            # In full float32 on every device: a GPU's faster sums would be another protocol.
            with torch.inference_mode(), arithmetic("fp32"):
                seen, classes = extractor(some.to(extractor.device))
            features.append(seen.float().cpu())
            if classes is not None:
                logits.append(classes.float().cpu())
            if bar is not None:
                bar.advance(len(some))
    return Seen(torch.cat(features), torch.cat(logits) if logits else None)
