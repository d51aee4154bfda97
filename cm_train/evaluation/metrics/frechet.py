"""The Fréchet distance between two sets of features."""

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Wasserstein-2 distance of Gaussians fitted to two sets of features [N, D] (Heusel et al. 2017, eq. 6).

    It is biased by the number of samples: compare only values of equal N.
    """
    x, y = x.double(), y.double()
    # tr sqrt(Cx Cy) is the sum of the singular values of Lx' Ly for Cx = Lx Lx', Cy = Ly Ly': no matrix root needed,
    # and singular covariances do no harm.
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    b = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    ra, rb = torch.linalg.qr(a, mode="r").R, torch.linalg.qr(b, mode="r").R  # Cx = ra' ra
    cross = torch.linalg.svdvals(ra @ rb.T).sum()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return (mean + a.square().sum() + b.square().sum() - 2 * cross).item()
