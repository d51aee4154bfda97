"""Same-seed agreement: how close two models' images from the same seeds are."""

from dataclasses import dataclass

from torch import Tensor

from ...data.pixels import to_unit_range


@dataclass(frozen=True)
class Agreement:
    """rms: root mean square pixel difference on [-1, 1]; std_ratio: of the pixels' spread (below 1: blur)."""

    rms: float
    std_ratio: float


def agreement(images: Tensor, reference: Tensor) -> Agreement:
    """Compare uint8 images [N, C, H, W] with the reference's of the same seeds."""
    x, y = to_unit_range(images), to_unit_range(reference)
    return Agreement((x - y).square().mean().sqrt().item(), (x.std() / y.std()).item())
