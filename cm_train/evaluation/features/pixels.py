"""Pixels as they are: for what is close to the eye of nobody but a camera, as near-copies are."""

import hashlib
from typing import Literal

from torch import Tensor

from ...core.registry import register
from ...data.datasets.base import Dataset
from ...data.pixels import to_unit_range
from .base import Extractor, FeaturesConfig


@register
class Pixels(Extractor):
    """Each pixel's value in [-1, 1] is a feature: D = C * H * W."""

    batch_size = 512
    input = "pixels in [-1, 1], not resized"

    class Config(FeaturesConfig):
        name: Literal["pixels"] = "pixels"

    def __init__(self, config: Config, reference: Dataset | None = None):
        super().__init__()
        self.sha256 = hashlib.sha256(config.name.encode()).hexdigest()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return to_unit_range(images).flatten(1), None
