"""The Fréchet distance between two sets of features."""

import torch
from torch import Tensor

from ..gaussian import Gaussian


def frechet_distance(x: Tensor, y: Tensor | Gaussian) -> float:
    """Squared Wasserstein-2 distance of Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6).

    It is biased by the number of samples: compare only values of equal N.

    Args:
        x: features [N, D], N at least 2.
        y: others [M, D], or their statistics.
    """
    # tr sqrt(Cx Cy) is the sum of the singular values of Rx Ry' for Cx = Rx'Rx, Cy = Ry'Ry: no matrix root needed,
    # and singular covariances do no harm.
    mean_x, root_x = _mean_and_root(x)
    mean_y, root_y = (y.mean, y.root) if isinstance(y, Gaussian) else _mean_and_root(y)
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    mean = (mean_x - mean_y).square().sum()
    return (mean + root_x.square().sum() + root_y.square().sum() - 2 * cross).item()


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D], and R with R'R the covariance; [min(N, D), D], float64."""
    x = features.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R
