"""OpenAI's state dicts of consistency_models: diffusion models (EDM) and consistency models, all of ADM U-Nets."""

import re

from ..backbones.unet import UNetConfig
from ..denoiser import DenoiserConfig
from .base import CantImport, Imported, Source, Taken, Told

_SIZES: dict[tuple[float, ...], int] = {
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 2, 3, 4): 64,
}  # by published multipliers
_HEAD_CHANNELS = 64  # of all that are published


def knows(source: Source) -> bool:
    """Whether these are names of such a file."""
    return "input_blocks.0.0.weight" in source.tensors and "time_embed.0.weight" in source.tensors


def read(source: Source, told: Told) -> Imported:
    """The network of such a file, told 250 ln(sigma) as its code does.

    Raises:
        CantImport: tensors are missing, or say less than is needed.
    """
    taken = Taken(source)
    channels, image_channels = taken.shape("time_embed.0.weight")[1], taken.shape("input_blocks.0.0.weight")[1]
    if taken.shape("out.2.weight")[0] != image_channels:
        raise CantImport(
            f"{source.name} predicts a noise and a variance",
            f"{taken.shape('out.2.weight')[0]} channels for {image_channels}",
            "a model that predicts as EDM or a consistency model do",
        )
    blocks, levels = _layout(taken)
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [taken.shape(f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
    size = _image_size(source, told, [width / channels for width in widths])
    attends = [size >> level for level, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in taken]
    heads = _heads(source, told, widths)
    width = widths[0]
    backbone = UNetConfig(
        channels=channels,
        channel_mult=[w // channels if w % channels == 0 else w / channels for w in widths],
        num_blocks=blocks,
        attention_resolutions=attends,
        **heads,
        scale_shift=taken.shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * width,
        resample_in_block=f"input_blocks.{firsts[0] + blocks}.0.op.weight" not in taken,
        strided_conv=f"input_blocks.{firsts[0] + blocks}.0.op.weight" in taken,
        noise_multiplier=1000.0,
    )
    classes = taken.shape("label_emb.weight")[0] if "label_emb.weight" in taken else 0
    _rename(taken, backbone)
    is_diffusion = _preconditioning(source, told) == "edm"
    denoiser = DenoiserConfig(
        kind="diffusion" if is_diffusion else "consistency",
        boundary="zero" if is_diffusion else "sigma_min",
        image_size=size,
        image_channels=image_channels,
        num_classes=classes,
        sigma_data=0.5,
        sigma_min=0.002,
        sigma_max=80.0,
    )
    return Imported(denoiser, backbone, taken.all(), licence="MIT")


def _layout(taken: Taken) -> tuple[int, int]:
    """Residual blocks a level, and levels. Each level but the finest ends with a decoder block that goes up."""
    names = "\n".join(taken.source.tensors)
    ups = re.findall(r"^output_blocks\.(\d+)\.(?:[12]\.in_layers\.0|[12]\.conv)\.weight$", names, re.MULTILINE)
    count = len(set(re.findall(r"^output_blocks\.(\d+)\.", names, re.MULTILINE)))
    blocks = min(map(int, ups)) if ups else count - 1
    if count == 0 or count % (blocks + 1):
        raise CantImport(f"{taken.source.name} has a decoder of no known layout", f"{count} blocks")
    return blocks, count // (blocks + 1)


def _image_size(source: Source, told: Told, mult: list[float]) -> int:
    size = told.image_size or _SIZES.get(tuple(mult))
    if size is None:
        raise CantImport(f"{source.name} does not say how large its images are", fix="cm-convert ... image_size=64")
    return size


def _heads(source: Source, told: Told, widths: list[int]) -> dict[str, int]:
    """The backbone's settings for attention heads: of so many channels, or so many of them."""
    width, count = told.num_head_channels or -1, told.num_heads or -1
    if width > 0:
        return {"head_channels": width}
    if count > 0:
        return {"num_heads": count}
    if any(w % _HEAD_CHANNELS for w in widths):
        fix = "cm-convert ... num_head_channels=32, or num_heads=4"
        raise CantImport(f"{source.name} does not say how many heads its attention has", fix=fix)
    return {"head_channels": _HEAD_CHANNELS}


def _preconditioning(source: Source, told: Told) -> str:
    """Both kinds of file have the same names in them; the published ones tell theirs at the start of their own."""
    if told.preconditioning is not None:
        return told.preconditioning
    for start, meaning in (("edm_", "edm"), ("cd_", "consistency"), ("ct_", "consistency")):
        if source.name.startswith(start):
            return meaning
    raise CantImport(
        f"{source.name} does not say whether it is a diffusion model or a consistency model",
        fix=f"cm-convert src={source.name} preconditioning=edm, or =consistency",
    )


_BLOCK = {
    "in_layers.0": "norm_in",
    "in_layers.2": "conv_in",
    "emb_layers.1": "embed",
    "out_layers.0": "norm_out",
    "out_layers.3": "conv_out",
}


def _rename(taken: Taken, backbone: UNetConfig) -> None:
    def both(theirs: str, ours: str) -> None:
        taken.take(f"{theirs}.weight", f"{ours}.weight")
        taken.take(f"{theirs}.bias", f"{ours}.bias")

    def block(theirs: str, ours: str) -> None:
        for one, other in _BLOCK.items():
            both(f"{theirs}.{one}", f"{ours}.{other}")
        if f"{theirs}.skip_connection.weight" in taken:
            both(f"{theirs}.skip_connection", f"{ours}.skip")

    def attention(theirs: str, ours: str) -> None:
        both(f"{theirs}.norm", f"{ours}.norm")
        both(f"{theirs}.qkv", f"{ours}.qkv")  # rows in our order of (q|k|v, head, channel)
        both(f"{theirs}.proj_out", f"{ours}.proj")

    def stage(theirs: str, ours: str) -> None:
        if f"{theirs}.0.op.weight" in taken:
            both(f"{theirs}.0.op", f"{ours}.block.conv")
        else:
            block(f"{theirs}.0", f"{ours}.block")
        after = 1
        if f"{theirs}.1.qkv.weight" in taken:
            attention(f"{theirs}.1", f"{ours}.attention")
            after = 2
        if f"{theirs}.{after}.in_layers.0.weight" in taken:
            block(f"{theirs}.{after}", f"{ours}.up")
        elif f"{theirs}.{after}.conv.weight" in taken:
            both(f"{theirs}.{after}.conv", f"{ours}.up.conv")

    both("time_embed.0", "embed_in")
    both("time_embed.2", "embed_out")
    if "label_emb.weight" in taken:
        taken.take("label_emb.weight", "embed_label.weight")
    both("input_blocks.0.0", "first")
    count = len(backbone.channel_mult) * (backbone.num_blocks + 1)
    for i in range(1, count):
        stage(f"input_blocks.{i}", f"encoder.{i - 1}")
    block("middle_block.0", "middle.0.block")
    attention("middle_block.1", "middle.0.attention")
    block("middle_block.2", "middle.1.block")
    for i in range(count):
        stage(f"output_blocks.{i}", f"decoder.{i}")
    both("out.0", "norm_out")
    both("out.2", "last")
