"""Generated images beside the training images that are nearest to them: what a look for copies begins with."""

import torch
from torch import Tensor

from ..data.datasets.base import Dataset
from ..data.pixels import grid
from .nearest import nearest
from .seen import Seen

NUM_NEAREST = 3


def with_nearest(images: Tensor, samples: Seen, real: Seen, reference: Dataset, num: int) -> Tensor:
    """One picture: `num` generated images in the top row, under each its nearest real ones, the nearest first.

    Those are shown that lie nearest of all: where there are copies, they are among them.

    Args:
        images: generated ones, uint8 [N, C, H, W], the first of `samples`.
        real: of all images of `reference`, in its order.
    """
    k = min(NUM_NEAREST, len(real))
    found = nearest(samples.rows(torch.arange(len(images))).features, real.features, k)
    shown = found.distance[:, 0].argsort(stable=True)[:num]
    beside = reference.gather(found.rows[shown].T.flatten())[0].cpu()
    return grid(torch.cat([images[shown], beside]), columns=len(shown))
