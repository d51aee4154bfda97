"""DINOv2: by its features distances agree with people's judgement better than by Inception's (Stein et al. 2023).

FD on them is what EDM2's authors report beside FID.
"""

import os
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.registry import register
from ...core.settings import Text
from ...data.datasets.base import Dataset
from .base import Extractor, FeaturesConfig, in_colour, resized, sha256_of, version_of

_SIDE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@register
class DinoV2(Extractor):
    """The class token after the last norm, of a checkpoint in transformers' format: 1,024 features for ViT-L/14.

    Raises:
        InputError: transformers is missing, or there is no such checkpoint here and none can be fetched.
    """

    batch_size = 32
    input = f"scaled to {_SIDE} (bicubic, antialiased), normalised as ImageNet's"

    class Config(FeaturesConfig):
        name: Literal["dinov2"] = "dinov2"
        path: Text = "facebook/dinov2-large"  # a folder with config.json and model.safetensors, or a name on the hub

    def __init__(self, config: Config, reference: Dataset | None = None):
        super().__init__()
        try:
            from transformers import Dinov2Model
        except ImportError:
            raise InputError("features=dinov2 needs the package transformers", fix="pip install transformers") from None
        path = os.path.expanduser(config.path)
        try:
            # Safetensors alone: other formats may run code.
            self.network = Dinov2Model.from_pretrained(path, use_safetensors=True).requires_grad_(False).eval()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            got = f"{config.path}: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
            fix = "features.path=... a folder that holds them, or features=efficientnet, which needs no download"
            raise InputError("DINOv2's weights can't be had", got, "config.json and model.safetensors", fix) from None
        self.sha256 = sha256_of(self.network.state_dict())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, std = (255 * torch.tensor(values, device=images.device).view(3, 1, 1) for values in (_MEAN, _STD))
        x = (resized(in_colour(images), _SIDE, "bicubic") - mean) / std
        return self.network(pixel_values=x).last_hidden_state[:, 0], None

    def made_with(self) -> dict[str, str]:
        return version_of("transformers")
