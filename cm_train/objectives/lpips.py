"""LPIPS, a distance that compares what a network sees, and the weights that it needs from outside this package."""

import hashlib
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.downloads import download
from ..core.errors import InputError
from ..core.registry import register
from ..core.terminal import say
from .distances import DistanceConfig

_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"


@register
class LPIPS(nn.Module):
    """Weighted squared differences of VGG16's normalised features: Zhang et al. 2018, eq. 1, as in Song et al. 2023.

    Images below 256 pixels are enlarged to 224 first. The pooling is VGG's own maximum, as in the `lpips` library and
    Song et al.'s JAX code; their PyTorch code averages instead, and its values can't be compared with these.

    Raises:
        InputError: the library or VGG16's weights are not there.
    """

    class Config(DistanceConfig):
        name: Literal["lpips"] = "lpips"
        is_deterministic: ClassVar[bool] = False  # enlarges and pools, whose gradients CUDA adds up in any order

        def check_machine(self) -> None:
            _library()
            weights_file()

    def __init__(self, config: Config | None = None):
        super().__init__()
        lpips, path = _library(), weights_file()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # the library calls torchvision in a deprecated way
            # Random at first: the library would unpickle the file without weights_only.
            self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        stored = torch.load(path, map_location="cpu", weights_only=True)
        # slice2.5.weight is features.5.weight: the library cuts VGG into slices and keeps the layers' numbers.
        backbone = self.network.net
        backbone.load_state_dict({n: stored[f"features.{n.partition('.')[2]}"] for n in backbone.state_dict()})
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)  # the heads have dropout, which is for fitting them

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] twice -> float32 [B]."""
        with torch.autocast(x.device.type, enabled=False):
            return self.network(_prepared(x), _prepared(y)).flatten()


def _prepared(x: Tensor) -> Tensor:
    x = x.float()
    if x.shape[-1] < 256:
        x = F.interpolate(x, size=(224, 224), mode="bilinear")
    return x.expand(-1, 3, -1, -1)  # grey as three equal channels


def weights_path() -> Path:
    """Where VGG16's weights belong, whether or not they are there."""
    return Path(torch.hub.get_dir(), "checkpoints", _URL.rpartition("/")[2])


def _library() -> Any:
    try:
        import lpips
    except ImportError as error:
        fix = "pip install 'cm-train[lpips]'"
        raise InputError("objective.distance=lpips needs the lpips library", str(error), fix=fix) from None
    return lpips


def weights_file() -> Path:
    """Torchvision's VGG16 in torch.hub's folder, downloaded where it is missing.

    Raises:
        InputError: it can't be downloaded, or the file there is another.
    """
    path = weights_path()
    try:
        if not path.exists():
            say(f"downloading VGG16 for objective.distance=lpips (553 MB) to {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            download([_URL], path, "sha256", _SHA256, "VGG16")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            "objective.distance=lpips needs VGG16's weights, which could not be had", str(error), fix=_fix(path)
        ) from None
    if digest != _SHA256:
        raise InputError(
            f"{path} is truncated or another file", f"sha256 {digest}", _SHA256, f"delete it, or {_fix(path)}"
        )
    return path


def _fix(path: Path) -> str:
    return f"put {_URL} at {path}"
