"""What a notebook says in few words: a run in a denoiser's place, a number of images, classes by name, other noise.

`generate` reads its arguments through these, and here is what goes with it: the noise that it starts from, and what its
images are of.
"""

import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.rng import PerImageNoise
from ..core.settings import excerpt
from ..models.checkpoints import find
from ..models.checkpoints.load import load_denoiser
from ..models.denoiser import Denoiser, DenoiserConfig
from .guidance import Guided
from .labels import captions_of, class_number, drawn_labels, one_an_image

Model: TypeAlias = str | os.PathLike[str] | Denoiser | Guided  # a path is that of a run or checkpoint
Seeds: TypeAlias = int | Iterable[int]  # so many, 0, 1, 2, ..., or which
Labels: TypeAlias = int | str | Sequence[int | str]  # a class for all images, or one an image


def initial_noise(model: Model, seeds: Seeds) -> Tensor:
    """What the images of these seeds begin as, whatever model of that size makes them: unit normals [N, C, H, W].

    For `generate(..., noise=...)`. Between two of them cos(a) * first + sin(a) * second, a from 0 to pi / 2, is unit
    normal too, as the network expects; half of each is too weak.

    Raises:
        InputError: there is no such model.
    """
    shape, numbers = _config(model).image_shape, as_seeds(seeds)
    return PerImageNoise(numbers).randn("initial", shape) if numbers else torch.empty(0, *shape)


def class_names(model: Model) -> list[str]:
    """The names of a model's classes, in the order of their numbers; empty where it has none or knows no names.

    Raises:
        InputError: there is no such model.
    """
    return list(_config(model).class_names)


def captions(model: Model, seeds: Seeds, labels: Labels | None = None) -> list[str]:
    """What the images are of that `generate` makes of the same arguments: names of classes, for `show(captions=)`.

    Names that the picture's font can't write are numbers. A model without classes has no captions.

    Raises:
        InputError: there is no such model, or it has no such classes.
    """
    config, numbers = _config(model), as_seeds(seeds)
    if labels is not None:
        return captions_of(as_labels(labels, len(numbers), config), config.class_names)
    return captions_of(drawn_labels(numbers, config.num_classes), config.class_names) if config.num_classes else []


def as_denoiser(model: Model) -> Denoiser | Guided:
    """The model itself, or that of a path: its averaged weights, on a GPU where there is one. Raises InputError."""
    if isinstance(model, str | os.PathLike):
        return load_denoiser(model, device="cuda" if torch.cuda.is_available() else "cpu")
    _config(model)
    return model


def as_seeds(seeds: Any) -> list[int]:
    """The seeds that `Seeds` means. Raises InputError where it means none."""
    given = seeds.tolist() if hasattr(seeds, "tolist") else seeds  # a tensor's or an array's
    allowed = "how many images, or the seed of each"
    if isinstance(given, int):
        if given < 0:
            raise InputError("seeds can't be a negative number of images", given, allowed)
        return [*range(given)]
    try:
        return [operator.index(seed) for seed in given]
    except TypeError:
        raise InputError("seeds are whole numbers", excerpt(seeds), allowed) from None


def as_labels(labels: Any, count: int, config: DenoiserConfig) -> list[int]:
    """A class for each of `count` images: text is a name, a number that class's number. Raises InputError."""
    given = labels.tolist() if hasattr(labels, "tolist") else labels
    is_one = isinstance(given, str | int)
    try:
        each = [given] if is_one else list(given)
        known = {label: _number(label, config) for label in dict.fromkeys(each)}
    except TypeError:
        raise InputError("labels are names or numbers of classes", excerpt(labels)) from None
    numbers = [known[label] for label in each]
    return one_an_image(numbers[0] if is_one else numbers, count, config.num_classes)


def check_noise(noise: Any, count: int, config: DenoiserConfig) -> None:
    """Raise InputError where it can't be what `count` images begin as."""
    shape = (count, *config.image_shape)
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.shape != shape:
        got = f"{noise.dtype} {list(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise InputError("noise is a unit normal for each value of each image", got, f"a float tensor {list(shape)}")


def _number(label: Any, config: DenoiserConfig) -> int:
    return class_number(label, config) if isinstance(label, str) else operator.index(label)


def _config(model: Any) -> DenoiserConfig:
    if isinstance(model, str | os.PathLike):
        return find.read(model, lambda _, manifest: manifest.denoiser)
    config = getattr(model, "config", None)
    if not isinstance(config, DenoiserConfig):
        raise InputError("this is no model", type(model).__name__, "a run's folder, or what load_denoiser returns")
    return config
