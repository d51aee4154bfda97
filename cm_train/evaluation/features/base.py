"""What every extractor of features offers."""

import hashlib
from abc import ABC, abstractmethod
from contextlib import suppress
from importlib import metadata
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import InputError
from ...core.registry import ComponentConfig


class FeaturesConfig(ComponentConfig):
    """The `features` group."""

    kind: ClassVar = "features"


class Extractor(nn.Module, ABC):
    """Turns uint8 images into features. Built as `cls(config, reference)`.

    `reference` is the data set that images are compared with, for an extractor that learns from it, or None.

    Attributes:
        batch_size: images that it takes at once.
        device: where it wants them.
        sha256: of its weights; of its name where it has none.
        input: what is done to an image before it is looked at, in words.
    """

    batch_size: int = 64
    device: torch.device = torch.device("cpu")
    sha256: str
    input: str

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [B, D] of uint8 images [B, C, H, W], C 1 or 3, and logits [B, K] where it knows classes."""

    def made_with(self) -> dict[str, str]:
        """The versions of the packages, beside torch, that its numbers may hang on."""
        return {}


def in_colour(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] with three channels; grey ones have three alike."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def resized(images: Tensor, side: int, mode: str) -> Tensor:
    """uint8 images [B, C, H, W] as float32 of another side, antialiased where they shrink; not clamped."""
    x = images.float()
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode=mode, align_corners=False, antialias=True)


def sha256_of(state: dict[str, Tensor]) -> str:
    """Of weights: their names, shapes and values, whatever file they are from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def needs(package: str, what: str) -> InputError:
    """What to raise where an optional package is missing."""
    return InputError(f"{what} needs the package {package}", fix="pip install 'cm-train[eval]'")


def version_of(package: str) -> dict[str, str]:
    """Of a package by its name; nothing where it is not installed."""
    with suppress(metadata.PackageNotFoundError):
        return {package: metadata.version(package)}
    return {}
