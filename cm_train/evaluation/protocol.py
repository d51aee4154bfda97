"""How numbers came about: what they are of, and all that makes them comparable with others, or not."""

import platform
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from .. import __version__
from ..core.errors import InputError
from ..core.settings import Settings, excerpt
from .features.base import Extractor
from .metrics.base import Metric

ROUNDING = "(x + 1) * 127.5 to the nearest whole number, 0 to 255"
ENOUGH = 1000  # images, below which models can hardly be told apart
_BRIEF = 60  # characters of a value that two protocols differ in


class ReferenceFacts(Settings):
    """Real images: `sha256` tells them from others, see `Dataset.fingerprint`; of statistics it is their file's."""

    what: str
    sha256: str
    num: int | None  # None where statistics don't say
    image_size: int | None
    channels: int | None


class FeaturesFacts(Settings):
    """What looked at the images, and at which size: `sha256` is of its weights."""

    name: str
    sha256: str
    input: str


class ModelFacts(Settings):
    """What drew the images."""

    kind: Literal["model"] = "model"
    ckpt: str
    step: int
    weights: str
    sha256: str  # of those weights
    seeds: list[str]  # of each block, as "0-2047"
    sampler: str
    sigmas: list[float]
    network_calls: int  # an image
    labels: str | None  # None: the model has no classes
    guidance: float
    precision: str

    def differences(self, other: object) -> list[str]:
        """What makes the images of `other` others, in words; a run may lie and be called as it likes."""
        if not isinstance(other, ModelFacts):
            return ["a model's images, and images that were there"]
        mine, theirs = self.model_dump(exclude={"ckpt"}), other.model_dump(exclude={"ckpt"})
        return [f"{key} ({_brief(mine[key])} and {_brief(theirs[key])})" for key in mine if mine[key] != theirs[key]]

    @property
    def name(self) -> str:
        """For a table."""
        calls = f"{self.network_calls} call{'s' * (self.network_calls > 1)}"
        usual = "" if self.weights == "ema" else f", {self.weights}"
        return f"{self.ckpt} at {self.step}, {calls}{usual}"


class SamplesFacts(Settings):
    """Images that were there already: `sha256` is of their pixels, in order."""

    kind: Literal["samples"] = "samples"
    path: str
    sha256: str

    def differences(self, other: object) -> list[str]:
        """What makes `other` other images, in words."""
        if not isinstance(other, SamplesFacts):
            return ["images that were there, and a model's"]
        return [] if self.sha256 == other.sha256 else [f"pixels (of {_brief(self.path)} and {_brief(other.path)})"]

    @property
    def name(self) -> str:
        """For a table."""
        return self.path


class Protocol(Settings):
    """All of it: `eval.json` has one beside the numbers."""

    name: str | None  # of the published one that it follows
    num: int  # images each number is of
    spread: str  # what the deviations are over
    reference: ReferenceFacts
    held_out: ReferenceFacts | None
    features: FeaturesFacts
    metrics: dict[str, dict[str, Any]]  # their settings
    rounding: str
    of: Annotated[ModelFacts | SamplesFacts, Field(discriminator="kind")]
    versions: dict[str, str]

    def differences(self, other: "Protocol") -> list[str]:
        """What makes the numbers of two protocols incomparable, in words; empty where they may share a table.

        Not what they are of, nor the versions of libraries, which are told.
        """
        pairs = {
            "images": (self.num, other.num),
            "spread": (self.spread, other.spread),
            "reference": (self.reference.sha256, other.reference.sha256),
            "reference's images": (self.reference.num, other.reference.num),
            "held-out pictures": tuple(None if p.held_out is None else p.held_out.sha256 for p in (self, other)),
            "features": (self.features.name, other.features.name),
            "weights of the features": (self.features.sha256, other.features.sha256),
            "what the features see": (self.features.input, other.features.input),
            "rounding": (self.rounding, other.rounding),
        }
        for metric in self.metrics.keys() & other.metrics.keys():
            pairs[f"settings of {metric}"] = self.metrics[metric], other.metrics[metric]
        return [f"{what} ({_brief(a)} and {_brief(b)})" for what, (a, b) in pairs.items() if a != b]


def check_comparable(protocols: Mapping[str, Protocol]) -> None:
    """Refuse a table of numbers that came about in different ways. Raises InputError.

    Args:
        protocols: by the name of what they are of.
    """
    names = list(protocols)
    for name in names[1:]:
        if differences := protocols[names[0]].differences(protocols[name]):
            what = f"numbers of {names[0]} and of {name} can't share a table"
            raise InputError(what, "; ".join(differences), fix="measure both again in one way")


def versions(extractor: Extractor, metrics: list[Metric]) -> dict[str, str]:
    """Of what computed the numbers."""
    import numpy as np
    import PIL
    import torchvision

    found = {
        "cm_train": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": str(np.__version__),
        "pillow": str(PIL.__version__),
    }
    found |= extractor.made_with()
    for metric in metrics:
        found |= metric.made_with()
    return found


def _brief(value: object) -> str:
    text = excerpt(value)
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 3]}..."
