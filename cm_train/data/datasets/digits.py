"""The 1,797 handwritten 8x8 digits that scikit-learn carries: real data without a download."""

import gzip
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import torch

from ...core import rng
from ...core.errors import InputError
from ...core.registry import register
from ...core.world import ALONE, World
from .base import DatasetConfig, Facts
from .in_memory import InMemory

_NUM = 1797
_NUM_TEST = 360


@register
class Digits(InMemory):
    """Alpaydin & Kaynak 1998, test part of the UCI set; grey levels 0..16 stretched to 0..255.

    Raises:
        InputError: scikit-learn or its file is missing or damaged.
    """

    class Config(DatasetConfig):
        is_published = True

        name: Literal["digits"] = "digits"
        split: Literal["all", "train", "test"] = "all"  # test: 360 images, the same ones always; train: the rest

        def known_facts(self) -> Facts:
            count = {"all": _NUM, "train": _NUM - _NUM_TEST, "test": _NUM_TEST}[self.split]
            return Facts(8, 1, count, has_classes=True)

        def held_out(self) -> Self | None:
            return self.model_copy(update={"split": "test"}) if self.split == "train" else None

    def __init__(self, config: Config, world: World = ALONE):
        table = torch.from_numpy(_read())  # [N, 65]
        order = rng.permutation(0, "digits", 0, _NUM)
        part = {"all": order, "train": order[_NUM_TEST:], "test": order[:_NUM_TEST]}[config.split].sort().values
        images = (table[part, :64] * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
        labels = table[part, 64].long() if config.conditional else None
        super().__init__(images, labels, [str(digit) for digit in range(10)], config.hflip)


def _read():
    """The table of pixels and label, float32 [1797, 65].

    Importing scikit-learn takes over half a second, reading its file a few milliseconds.
    """
    import numpy as np

    fix = "pip install --force-reinstall scikit-learn"
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise InputError("dataset digits comes with scikit-learn, which is not installed", fix=fix)
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise InputError("can't read scikit-learn's digits", f"{path}: {error}", fix=fix) from error
    if table.shape != (_NUM, 65) or table.min() < 0 or table[:, :64].max() > 16 or table[:, 64].max() > 9:
        raise InputError("scikit-learn's digits are not what they were", str(path), "1797 rows of 65 numbers", fix)
    return table
