"""NVIDIA's networks of EDM2 (Karras et al. 2024)."""

import itertools
import re

import torch
from torch import Tensor

from ..backbones.edm2 import EDM2Config
from ..denoiser import DenoiserConfig
from .base import CantImport, Imported, Source, Taken, Told, by_parts
from .edm import LICENCE, number, preconditioning

_KINDS = {"Precond": "edm", "ECMPrecond": "consistency"}  # by the class around the network
_HEAD_CHANNELS = 64
_PARTS = {"conv_res0": "conv_in", "emb_linear": "embed", "conv_res1": "conv_out", "conv_skip": "skip"}


def knows(source: Source) -> bool:
    """Whether these are names of such a file."""
    return "unet.out_gain" in source.tensors


def read(source: Source, told: Told) -> Imported:
    """The network of such a file, its weights in float32.

    Raises:
        CantImport: tensors are missing, or it is of another preconditioning.
    """
    taken = Taken(source)
    taken.drop("logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight", ".resample_filter")
    names = "\n".join(source.tensors)
    encoder = re.findall(r"^unet\.enc\.(\d{1,4})x\1_block0\.emb_gain$", names, re.MULTILINE)
    sizes = sorted(map(int, encoder), reverse=True)
    if not sizes or any(a != 2 * b for a, b in itertools.pairwise(sizes)):
        raise CantImport(f"{source.name} has levels of no known layout", f"{sizes}", "each half of the one before")
    size = sizes[0]
    channels, inputs = taken.shape(f"unet.enc.{size}x{size}_conv.weight")[:2]
    blocks = len(re.findall(rf"^unet\.enc\.{size}x{size}_block\d+\.emb_gain$", names, re.MULTILINE))
    widths = [taken.shape(f"unet.enc.{r}x{r}_block0.conv_res1.weight")[0] for r in sizes]
    backbone = EDM2Config(
        channels=channels,
        channel_mult=[width // channels for width in widths],
        num_blocks=blocks,
        attention_resolutions=[r for r in sizes if f"unet.enc.{r}x{r}_block0.attn_qkv.weight" in taken],
        head_channels=min(_HEAD_CHANNELS, *widths),
    )
    classes = taken.shape("unet.emb_label.weight")[1] if "unet.emb_label.weight" in taken else 0
    _rename(taken, sizes, blocks)
    denoiser = DenoiserConfig(
        kind="diffusion" if preconditioning(source, told, _KINDS) == "edm" else "consistency",
        boundary="zero",
        image_size=size,
        image_channels=inputs - 1,  # one more is of ones
        num_classes=classes,
        sigma_data=number(source, "sigma_data", 0.5),
        sigma_min=0.002,
        sigma_max=80.0,
    )
    return Imported(denoiser, backbone, taken.all(), LICENCE)


def _rename(taken: Taken, sizes: list[int], blocks: int) -> None:
    gains: list[Tensor] = []

    def block(theirs: str, ours: str) -> None:
        gains.append(taken.pop(f"unet.{theirs}.emb_gain").reshape(()))
        for one, other in _PARTS.items():
            if one != "conv_skip" or f"unet.{theirs}.conv_skip.weight" in taken:
                taken.take(f"unet.{theirs}.{one}.weight", f"{ours}.{other}.weight")
        if f"unet.{theirs}.attn_qkv.weight" in taken:
            rows = taken.pop(f"unet.{theirs}.attn_qkv.weight")
            heads = max(1, len(rows) // 3 // _HEAD_CHANNELS)
            taken.put(f"{ours}.attention.qkv.weight", by_parts(rows, "head channel qkv", heads))
            taken.take(f"unet.{theirs}.attn_proj.weight", f"{ours}.attention.proj.weight")

    taken.take("unet.emb_fourier.freqs", "noise.freqs")
    taken.take("unet.emb_fourier.phases", "noise.phases")
    taken.take("unet.emb_noise.weight", "embed_noise.weight")
    if "unet.emb_label.weight" in taken:
        taken.take("unet.emb_label.weight", "embed_label.weight")
    taken.take(f"unet.enc.{sizes[0]}x{sizes[0]}_conv.weight", "first.weight")
    place = 0
    for level, r in enumerate(sizes):
        for kind in [*(["down"] if level else []), *(f"block{i}" for i in range(blocks))]:
            block(f"enc.{r}x{r}_{kind}", f"encoder.{place}")
            place += 1
    place = 0
    for r in reversed(sizes):
        for kind in [*(["in0", "in1"] if r == sizes[-1] else ["up"]), *(f"block{i}" for i in range(blocks + 1))]:
            block(f"dec.{r}x{r}_{kind}", f"decoder.{place}")
            place += 1
    taken.take("unet.out_conv.weight", "last.weight")
    gains.append(taken.pop("unet.out_gain").reshape(()))
    taken.put("gains.values", torch.stack([gain.float() for gain in gains]))
