"""The features that FID is defined on: Inception-v3 as TensorFlow published it on 2015-12-05, by torch-fidelity."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.downloads import alone_in, download
from ...core.errors import InputError
from ...core.files import may_pass, patiently, unreadable
from ...core.registry import register
from ...core.settings import Text
from ...core.user_cache import cache_folder
from ...data.datasets.base import Dataset
from .base import Extractor, FeaturesConfig, in_colour, needs, sha256_of, version_of

_FILE = "weights-inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_FILE}"
# torch.hub's custom: the file's name has the first digits of its sha256, and those are what is checked.
_SHA256_BEGINS = "6726825d"
_MOST_BYTES = 1 << 28


@register
class Inception(Extractor):
    """2,048 features after the last pooling, and 1,008 logits without bias, as the Inception score takes them.

    Raises:
        InputError: torch-fidelity is missing; the weights can't be fetched, or the file given is not theirs.
    """

    input = "scaled to 299 (bilinear as TensorFlow 1 does it, not antialiased), (x - 128) / 128"

    class Config(FeaturesConfig):
        name: Literal["inception"] = "inception"
        path: Text | None = None  # a file of the weights; None: fetched once, into the user's cache

    def __init__(self, config: Config, reference: Dataset | None = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise needs("torch-fidelity", "features=inception") from None
        path = _fetched() if config.path is None else Path(os.path.expanduser(config.path))
        state = _read(path)
        # The library unpickles the file that it is given, which may run code: it gets what was read without.
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
            )
        except RuntimeError as error:
            got = str(error).split("\n")[0]
            raise InputError(f"{path} does not hold Inception's weights", got, f"torch-fidelity's {_FILE}") from None
        self.sha256 = sha256_of(self.network.state_dict())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(in_colour(images))
        return features, logits

    def made_with(self) -> dict[str, str]:
        return version_of("torch-fidelity")


def _read(path: Path) -> dict[str, Any]:
    """A file of weights, without running what it says. Raises InputError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is larger than Inception's weights are")
        state = patiently(lambda: torch.load(path, map_location="cpu", weights_only=True))
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it is no table of tensors")
    except Exception as error:  # torch raises a dozen types here
        if may_pass(error):
            raise unreadable(path, error) from None
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        raise InputError(f"{path} can't be read as weights", reason, f"torch-fidelity's {_FILE}") from None
    return state


def _fetched() -> Path:
    """The published weights in the user's cache, fetched where they are not there yet. Raises InputError offline."""
    home = cache_folder("inception")
    path = home / _FILE
    fix = f"put {_FILE} into {home}, or set features.path=...; or features=efficientnet, which needs no download"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with alone_in(home, "Inception's weights"):
            if not path.exists():
                download([_URL], path, "sha256", _SHA256_BEGINS, "Inception's weights")
            elif not _is_published(path):
                raise InputError(f"{path} is damaged", allowed=f"a sha256 that begins with {_SHA256_BEGINS}", fix=fix)
    except OSError as error:
        raise InputError("Inception's weights can't be fetched", str(error), fix=fix) from None
    return path


def _is_published(path: Path) -> bool:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(_SHA256_BEGINS)
