"""Real images that an extractor has looked at, ready to compare generated ones with."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL
import torch

from ..core import registry
from ..core.errors import InputError
from ..core.progress import progress
from ..data.datasets.base import Dataset
from .cache import Tensors, kept
from .features.base import Extractor, FeaturesConfig
from .gaussian import Gaussian
from .measure import first_rows, numbers
from .metrics.base import Metric, MetricConfig, Real
from .protocol import FeaturesFacts, ReferenceFacts
from .seen import Seen, look
from .sources import Statistics

AUTO = "auto"
_KEPT_BYTES = 1 << 30  # of features that are kept in the user's cache
_AT_ONCE = 256  # images read
_VERSIONS = 1, torch.__version__, PIL.__version__  # of how features come about, the first of this project's own part
_LEAST_REAL = 64  # held-out pictures whose own numbers say anything


@dataclass(frozen=True)
class Comparison:
    """What is needed to measure generated images.

    Attributes:
        images: the reference's; None where it is statistics.
    """

    extractor: Extractor
    metrics: list[Metric]
    real: Real
    reference: ReferenceFacts
    held_out: ReferenceFacts | None
    features: FeaturesFacts
    images: Dataset | None

    def numbers_of_real(self, most: int) -> tuple[dict[str, float], int]:
        """What at most `most` held-out pictures score in generated ones' place, and how many; nothing of a few.

        Of fewer than `most` there are those numbers alone that mean the same of few.
        """
        held_out = self.real.held_out
        if held_out is None or len(held_out) < _LEAST_REAL:
            return {}, 0
        some = first_rows(held_out, most)
        metrics = [m for m in self.metrics if m.suits_real and m.lacks(some, self.real) is None]
        comparable = {name for m in metrics for name in (m.numbers if len(some) == most else m.unbiased)}
        found = numbers([m for m in metrics if comparable & {*m.numbers}], some, self.real)
        return {name: value for name, value in found.items() if name in comparable}, len(some)


def chosen_features(values: Mapping[str, Any], channels: int, has_classes: bool) -> FeaturesConfig:
    """The settings of the `features` group, of the usual ones where it says `auto`.

    Raises:
        InputError: see `registry.settings`.
    """
    if values.get("name") == AUTO:
        values = {"name": usual_features(channels, has_classes)}
    config: FeaturesConfig = registry.settings("features", values)
    return config


def usual_features(channels: int, has_classes: bool) -> str:
    """What `auto` stands for: what is learnt from grey images' classes, or else from photographs."""
    return "classifier" if channels == 1 and has_classes else "efficientnet"


def compare_with(
    reference: Dataset | Statistics,
    what: str,
    features: FeaturesConfig,
    metrics: Sequence[MetricConfig],
    shape: tuple[int, int, int],
    held_out: Dataset | None = None,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Have an extractor look at the real images, or remember what it saw.

    Args:
        what: the reference, in the user's words.
        shape: of the images that will be compared, [C, H, W].
        held_out: images like the reference's that no model was trained on.

    Raises:
        InputError: the extractor can't be had, or does not fit the reference, or the images are too few, of another
            shape, or the same ones.
        Stopped: see `signals.heed`.
    """
    images = reference if isinstance(reference, Dataset) else None
    for some in (images, held_out):
        if some is not None and len(some) < 2:
            raise InputError("one picture is no set to compare with", f"{len(some)} in {what}", "2 or more")
    if held_out is not None:
        got = held_out.channels, held_out.image_size, held_out.image_size
        if got != shape:
            raise InputError("held-out pictures are of another shape", f"{list(got)}", f"{list(shape)}")
        if images is not None and held_out.fingerprint() == images.fingerprint():
            raise InputError("the held-out pictures are those of the reference", what, fix="held_out=... others")
    extractor: Extractor = registry.build(features, images).to(device)
    extractor.device = torch.device(device)
    name = features.name
    seen = None if images is None else _seen(images, extractor, "looking at real images")
    given = None if seen is not None else _checked(reference, extractor, name, shape)
    others = None if held_out is None else _seen(held_out, extractor, "looking at held-out images")
    return Comparison(
        extractor=extractor,
        metrics=[registry.build(metric) for metric in metrics],
        real=Real(name, seen, given, others),
        reference=_facts(reference, what),
        held_out=None if held_out is None else _facts(held_out, what),
        features=FeaturesFacts(name=name, sha256=extractor.sha256, input=extractor.input),
        images=images,
    )


def _seen(dataset: Dataset, extractor: Extractor, words: str) -> Seen:
    """What the extractor sees in all images of a set."""

    def make() -> Tensors:
        index = torch.arange(len(dataset)).split(_AT_ONCE)
        with progress(len(dataset), words) as bar:
            seen = look(extractor, (dataset.gather(some)[0] for some in index), bar)
        return {"features": seen.features} | ({} if seen.logits is None else {"logits": seen.logits})

    probe = look(extractor, [dataset.gather(torch.arange(1))[0]])
    if len(dataset) * probe.features.nbytes > _KEPT_BYTES:
        found = make()
    else:
        # What is left out of a set, and how files are decoded, is no part of its fingerprint.
        parts = dataset.fingerprint(), len(dataset), dataset.image_size, dataset.channels, *_VERSIONS
        key = hashlib.sha256(repr((parts, extractor.sha256, extractor.input)).encode()).hexdigest()
        found = kept("features", key, make)
    return Seen(found["features"], found.get("logits"))


def _checked(reference: Dataset | Statistics, extractor: Extractor, name: str, shape: tuple[int, int, int]) -> Gaussian:
    assert isinstance(reference, Statistics)
    probe = look(extractor, [torch.zeros(1, *shape, dtype=torch.uint8)])
    got, wanted = len(reference.gaussian.mean), probe.features.shape[1]
    if got != wanted:
        raise InputError(f"the reference's statistics are not of features={name}", f"{got} features", f"{wanted}")
    return reference.gaussian


def _facts(reference: Dataset | Statistics, what: str) -> ReferenceFacts:
    if isinstance(reference, Statistics):
        return ReferenceFacts(what=what, sha256=reference.sha256, num=None, image_size=None, channels=None)
    sha256 = reference.fingerprint()
    size, channels = reference.image_size, reference.channels
    return ReferenceFacts(what=what, sha256=sha256, num=len(reference), image_size=size, channels=channels)
