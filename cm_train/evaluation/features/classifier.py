"""Features of a small classifier that is trained on the reference's own labels: for grey digits and their like."""

import hashlib
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.errors import InputError
from ...core.registry import register
from ...core.terminal import say
from ...data.datasets.base import Dataset
from ..cache import kept
from .base import Extractor, FeaturesConfig, sha256_of
from .small_classifier import Classifier, train_classifier

_METHOD = "classifier 1"  # raised where another network would come of the same images
_MOST_IMAGES = 60_000  # that it is shown at most, however many there are
_MOST_EPOCHS = 30


@register
class ClassifierFeatures(Extractor):
    """64 features and the reference's classes. Trained once on each reference, and kept in the user's cache.

    Features are scaled so that the reference's have a mean square of 1, which a kernel of their products needs.

    Another machine may round otherwise, and so train another network: its hash is part of a result's protocol.

    Raises:
        InputError: the reference has no labels, or is statistics.
    """

    batch_size = 512
    input = "pixels in [-1, 1], not resized"

    class Config(FeaturesConfig):
        name: Literal["classifier"] = "classifier"
        seed: Annotated[int, Field(ge=0)] = 0

    def __init__(self, config: Config, reference: Dataset | None = None):
        super().__init__()
        if reference is None or not reference.num_classes:
            what = "features=classifier learns from the reference's labels, and it has none"
            raise InputError(what, fix="features=efficientnet, or a reference of images with classes")
        known = hashlib.sha256(f"{_METHOD} {config.seed} {reference.fingerprint()}".encode()).hexdigest()
        state = kept("classifiers", known, lambda: _train(reference, config.seed))
        self.network = Classifier(reference.channels, state["head.weight"].shape[0])
        self._scale = state["scale"].item()
        self.network.load_state_dict({name: tensor for name, tensor in state.items() if name != "scale"})
        self.network.requires_grad_(False).eval()
        self.sha256 = sha256_of(state)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.network.features(images)
        return features / self._scale, self.network.head(features)


def _train(reference: Dataset, seed: int) -> dict[str, Tensor]:
    images, labels = reference.gather(torch.arange(len(reference)))
    assert labels is not None
    epochs = max(1, min(_MOST_EPOCHS, _MOST_IMAGES // len(images)))
    say(f"training a classifier on the {len(images):,} images of the reference, {epochs} epochs, once")
    classifier = train_classifier(images.cpu(), labels.cpu(), seed, epochs)
    return {**classifier.state_dict(), "scale": classifier.features(images.cpu()).square().mean().sqrt()}
