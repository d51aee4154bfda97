"""From a path to a denoiser that is ready to sample."""

import os
from pathlib import Path

import torch

from ...core.run_layout import run_of
from ..calling import callable_by_hand
from ..denoiser import Denoiser, build_denoiser
from . import find, posthoc
from .manifest import Manifest
from .vanishing import present
from .weights import POWER, open_weights


def load_denoiser(path: str | os.PathLike[str], weights: str = "ema", device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser of a run or checkpoint folder, frozen.

    Call it as `denoiser(x, sigma, labels)`: noisy images [B, C, H, W] in [-1, 1] plus noise, their noise level (a
    number, or [B]) and, where the model has classes, their labels (a number, or [B]). It returns the denoised images,
    [B, C, H, W], not clamped. `denoiser.config` has image_shape, sigma_min, sigma_max, num_classes and class_names.

    Args:
        path: a run (its newest checkpoint), or one of its checkpoints.
        weights: "ema", "raw", one of several averages by name, "ema_0.9999", or "power_<width>", which a run with
            power-function averages holds or which is made of its snapshots.

    Raises:
        InputError: there is no checkpoint, it is damaged, or it has no such weights; of a call, what doesn't fit.
    """
    return callable_by_hand(load_checkpoint(path, weights, device)[2])


def load_checkpoint(
    path: str | os.PathLike[str], weights: str = "ema", device: torch.device | str = "cpu"
) -> tuple[Path, Manifest, Denoiser]:
    """`load_denoiser` that also says which checkpoint that is: its folder and its manifest."""
    return find.read(
        path, lambda folder, manifest: (folder, manifest, load_resolved(folder, manifest, weights, device))
    )


def load_resolved(
    folder: Path, manifest: Manifest, weights: str = "ema", device: torch.device | str = "cpu"
) -> Denoiser:
    """`load_denoiser` for a checkpoint that `resolve` has verified."""
    made = weights.startswith(POWER) and f"{weights}.safetensors" not in manifest.files
    with present(folder):
        stored = open_weights(folder, manifest, "ema" if made else weights)
    # Dropout is for training; its tables grow with the image size, which no weight bears witness to.
    backbone = manifest.backbone.model_copy(update={"dropout": 0.0})
    # A manifest may ask for any size of network; memory is taken only for what the file really holds.
    with torch.device("meta"):
        stored.check_fits(build_denoiser(manifest.denoiser, backbone))
    with torch.device(device):
        denoiser = build_denoiser(manifest.denoiser, backbone)
    if made:
        posthoc.reconstruct(run_of(folder), manifest, weights, denoiser)
    else:
        stored.load_into(denoiser)
    return denoiser.requires_grad_(False).eval()
