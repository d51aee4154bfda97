"""Noise levels: their range, and the grid of Karras et al. 2022."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

# Wider than anyone needs, and so that neither float32's squares nor the grid's powers leave their range.
Sigma = Annotated[float, Field(ge=1e-8, le=1e8)]
Rho = Annotated[float, Field(ge=0.1, le=1000)]


def karras_sigmas(
    num: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """The grid of Karras et al. 2022, eq. 5: float64 [num], descending, both ends exact.

    Args:
        num: number of points, at least 2 (num - 1 intervals).
    """
    ramp = torch.linspace(0, 1, num, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    sigmas[0], sigmas[-1] = sigma_max, sigma_min  # the boundary condition needs the last one exact
    return sigmas.to(device)
