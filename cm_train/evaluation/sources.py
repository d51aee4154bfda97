"""Where images come from that are evaluated, or compared with: a data set's name, a folder, a zip, an .npz."""

import os
from pathlib import Path
from typing import Literal

from ..core import registry
from ..core.errors import InputError
from ..core.world import ALONE
from ..data.datasets.base import Dataset, DatasetConfig
from ..data.datasets.image_folder import ImageFolder
from ..data.datasets.in_memory import InMemory
from ..data.open_files import open_files, sorted_names
from ..data.survey import survey
from .gaussian import Gaussian
from .npz_files import read_npz, sha256_of_file

_IMAGES = "images"  # where cm-sample puts them, in its folder


class Statistics:
    """A reference of which nothing but features' mean and covariance is known.

    Attributes:
        sha256: of its file.
    """

    def __init__(self, gaussian: Gaussian, sha256: str):
        self.gaussian, self.sha256 = gaussian, sha256


def real_images(text: str, image_size: int, channels: int) -> Dataset | Statistics:
    """The real images, or their statistics, that `text` names.

    Args:
        text: a data set by its name, which a folder's path never is (./digits is a folder), or a path.
        image_size, channels: what pictures of a folder or zip are made into.

    Raises:
        InputError: there is nothing of the kind, or it is of another size.
    """
    if text in registry.names("dataset"):
        return loaded(with_classes(registry.settings("dataset", {"name": text})))
    path = Path(os.path.expanduser(text))
    if text.lower().endswith(".npz"):
        found = read_npz(path)
        return Statistics(found, sha256_of_file(path)) if isinstance(found, Gaussian) else InMemory(found, None, [])
    if not os.path.isdir(path) and not any(os.path.isfile(place) for place in (path, *path.parents)):
        known = ", ".join(n for n in registry.names("dataset") if n != "image_folder")
        raise InputError("there are no such pictures", text, f"{known}, a folder or .zip of pictures, an .npz")
    c = _one_or_three(channels)
    config = ImageFolder.Config(root=text, image_size=image_size, channels=c, hflip=False, skip_broken=True)
    return loaded(config)


def samples_at(text: str) -> Dataset:
    """Generated images as they are: a folder of them (cm-sample's, or any), a zip, or an .npz.

    Raises:
        InputError: there are none, or they are not all square and of one size.
    """
    path = Path(os.path.expanduser(text))
    if text.lower().endswith(".npz"):
        found = read_npz(path)
        if isinstance(found, Gaussian):
            raise InputError(f"{text} holds statistics and no images", fix="reference=... takes statistics")
        return InMemory(found, None, [])
    if (path / _IMAGES).is_dir():
        path = path / _IMAGES
    elif (path / "samples.npz").is_file():
        return samples_at(str(path / "samples.npz"))
    if not os.path.isdir(path) and not any(os.path.isfile(place) for place in (path, *path.parents)):
        raise InputError("there are no such samples", text, "a folder or .zip of images, an .npz")
    files = open_files(str(path))
    seen = survey(files, sorted_names(files, str(path)))
    files.close()
    sizes = sorted(set(seen.sides))
    if len(sizes) != 1 or sizes[0][0] != sizes[0][1]:
        got = ", ".join(f"{w}x{h}" for w, h in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
        fix = "reference=... takes pictures of any size; samples=... takes what a model made"
        raise InputError(f"the images in {path} are to be square and of one size", got, fix=fix)
    channels = 1 if set(seen.modes) <= {"L", "1"} else 3
    config = ImageFolder.Config(root=str(path), image_size=sizes[0][0], channels=_one_or_three(channels), hflip=False)
    return loaded(config)


def with_classes(config: DatasetConfig) -> DatasetConfig:
    """The same images with the labels that a published set has, which a network may not have been told of."""
    return config.model_copy(update={"conditional": True}) if config.is_published else config


def loaded(config: DatasetConfig) -> Dataset:
    """A data set, ready to be looked at. Raises InputError."""
    dataset: Dataset = registry.build(config, ALONE)
    dataset.load()
    return dataset


def _one_or_three(channels: int) -> Literal[1, 3]:
    return 1 if channels == 1 else 3
