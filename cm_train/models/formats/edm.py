"""NVIDIA's networks of EDM (Karras et al. 2022), and ECT's, which are the same: DDPM++, NCSN++ and ADM."""

import itertools
import re
from collections.abc import Callable

from ..backbones.base import BackboneConfig
from ..backbones.songunet import SongUNetConfig
from ..backbones.unet import UNetConfig
from ..denoiser import DenoiserConfig
from .base import CantImport, Imported, Source, Taken, Told, by_parts

LICENCE = "CC BY-NC-SA 4.0, where NVIDIA published it"
_HEAD_CHANNELS = 64  # of ADM
_KINDS = {"EDMPrecond": "edm", "ECMPrecond": "consistency"}  # by the class around the network
_PARTS = {"norm0": "norm_in", "conv0": "conv_in", "affine": "embed", "norm1": "norm_out", "conv1": "conv_out"}
_WIDE = 128  # channels from which a norm has 32 groups; below it has one for each four channels


def knows(source: Source) -> bool:
    """Whether these are names of such a file."""
    return "model.map_layer0.weight" in source.tensors


def read(source: Source, told: Told) -> Imported:
    """The network of such a file.

    Raises:
        CantImport: tensors are missing, or it is of another preconditioning than EDM's.
    """
    taken = Taken(source)
    taken.drop(".resample_filter")
    sizes = _sizes(source)
    size = max(sizes)
    image_channels = taken.shape(f"model.enc.{size}x{size}_conv.weight")[1]
    is_adm = "model.out_norm.weight" in taken
    classes = taken.shape("model.map_label.weight")[1] if "model.map_label.weight" in taken else 0
    network = _Network(taken, sizes)
    backbone: BackboneConfig = network.adm() if is_adm else network.song()
    kind = preconditioning(source, told, _KINDS)
    denoiser = DenoiserConfig(
        kind="diffusion" if kind == "edm" else "consistency",
        boundary="zero",
        image_size=size,
        image_channels=image_channels,
        num_classes=classes,
        sigma_data=number(source, "sigma_data", 0.5),
        sigma_min=0.002,
        sigma_max=80.0,
    )
    return Imported(denoiser, backbone, taken.all(), LICENCE)


def preconditioning(source: Source, told: Told, known: dict[str, str]) -> str:
    """What the class around the network, or a person, says of its coefficients. Raises CantImport for others."""
    if told.preconditioning is not None:
        return told.preconditioning
    if source.class_name in known:
        return known[source.class_name]
    if source.class_name:
        what = f"{source.name} has coefficients that are not known here"
        raise CantImport(what, source.class_name, ", ".join(known), f"cm-convert src={source.name} preconditioning=edm")
    return "edm"


def number(source: Source, name: str, usual: float) -> float:
    """A plain number among the network's attributes."""
    value = source.attributes.get(name, usual)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else usual


def _sizes(source: Source) -> list[int]:
    """Sides of the levels, which are in the names of the layers, the finest first. Raises CantImport without any."""
    found = re.findall(r"^model\.enc\.(\d{1,4})x\1_block0\.", "\n".join(source.tensors), re.MULTILINE)
    sizes = sorted({int(side) for side in found}, reverse=True)
    if not sizes or any(a != 2 * b for a, b in itertools.pairwise(sizes)):
        raise CantImport(f"{source.name} has levels of no known layout", f"{sizes}", "each half of the one before")
    return sizes


class _Network:
    """One of both networks under our names, and its settings."""

    def __init__(self, taken: Taken, sizes: list[int]):
        self.taken, self.sizes = taken, sizes
        names = taken.source.tensors
        first = f"model.enc.{sizes[0]}x{sizes[0]}_block"
        self.blocks = len({name[len(first) :].split(".")[0] for name in names if name.startswith(first)})
        self.widths = [taken.shape(f"model.enc.{r}x{r}_block0.conv1.weight")[0] for r in sizes]
        self.attends = [r for r in sizes if f"model.enc.{r}x{r}_block0.qkv.weight" in taken]

    def song(self) -> SongUNetConfig:
        taken, sizes = self.taken, self.sizes
        size = sizes[0]
        channels = taken.shape(f"model.enc.{size}x{size}_conv.weight")[0]
        pyramid = next(
            (k for k in ("residual", "skip") if f"model.enc.{sizes[-1]}x{sizes[-1]}_aux_{k}.weight" in taken),
            "standard",
        )
        filters = [v for n, v in taken.source.tensors.items() if n.endswith(".resample_filter")]
        taps = [1.0, 1.0] if not filters else (filters[0][0, 0].sum(0) * filters[0].shape[-1]).tolist()
        fourier = "model.map_noise.freqs" in taken
        heads = [r for r in sizes if f"model.dec.{r}x{r}_aux_conv.weight" in taken]
        augment = "model.map_augment.weight" in taken
        config = SongUNetConfig(
            channels=channels,
            channel_mult=[width // channels for width in self.widths],
            num_blocks=self.blocks,
            attention_resolutions=self.attends,
            embedding="fourier" if fourier else "positional",
            encoder=pyramid,
            decoder="skip" if len(heads) > 1 else "standard",
            resample_filter=[round(tap / min(taps), 3) for tap in taps],
            augment_dim=taken.shape("model.map_augment.weight")[1] if augment else 0,
        )
        if fourier:
            taken.take("model.map_noise.freqs", "frequencies")
        if augment:
            taken.take("model.map_augment.weight", "embed_augment.weight")
        if "model.map_label.weight" in taken:
            self._both("map_label", "embed_label")
        self._both("map_layer0", "embed_in")
        self._both("map_layer1", "embed_out")
        self._both(f"enc.{size}x{size}_conv", "first")
        for level, r in enumerate(sizes):
            if level:
                self._block(f"enc.{r}x{r}_down", f"down.{level - 1}.block", None)
                if pyramid != "standard":
                    ours = f"pyramid.{level - 1}" + (".conv" if pyramid == "residual" else "")
                    self._both(f"enc.{r}x{r}_aux_{pyramid}", ours)
            for i in range(self.blocks):
                self._stage(f"enc.{r}x{r}_block{i}", f"encoder.{level}.{i}", _one_head)
        low = sizes[-1]
        for i in range(2):
            self._stage(f"dec.{low}x{low}_in{i}", f"middle.{i}", _one_head)
        for level, r in enumerate(sizes):
            if level < len(sizes) - 1:
                self._stage(f"dec.{r}x{r}_up", f"up.{level}", _one_head)
            for i in range(self.blocks + 1):
                self._stage(f"dec.{r}x{r}_block{i}", f"decoder.{level}.{i}", _one_head)
            if r in heads:
                self._both(f"dec.{r}x{r}_aux_norm", f"heads.{level}.norm")
                self._both(f"dec.{r}x{r}_aux_conv", f"heads.{level}.conv")
        return config

    def adm(self) -> UNetConfig:
        taken, sizes = self.taken, self.sizes
        size, low = sizes[0], sizes[-1]
        channels = taken.shape("model.map_layer0.weight")[1]
        widths = [*self.widths, *(2 * width for width in self.widths)]  # the decoder joins two
        if min(self.widths) < _WIDE < max(widths):
            what = f"{taken.source.name} has norms of groups of several sizes"
            raise CantImport(what, f"widths {self.widths}", f"all at least {_WIDE}, or at most {_WIDE // 2}")
        config = UNetConfig(
            channels=channels,
            channel_mult=[w // channels if w % channels == 0 else w / channels for w in self.widths],
            num_blocks=self.blocks,
            attention_resolutions=self.attends,
            head_channels=_HEAD_CHANNELS,
            group_channels=None if min(self.widths) >= _WIDE else 4,
        )
        self._both("map_layer0", "embed_in")
        self._both("map_layer1", "embed_out")
        if "model.map_label.weight" in taken:
            taken.put("embed_label.weight", taken.pop("model.map_label.weight").T)
        self._both(f"enc.{size}x{size}_conv", "first")
        place = 0
        for level, r in enumerate(sizes):
            if level:
                self._block(f"enc.{r}x{r}_down", f"encoder.{place}.block", None)
                place += 1
            for i in range(self.blocks):
                self._stage(f"enc.{r}x{r}_block{i}", f"encoder.{place}", _heads)
                place += 1
        self._stage(f"dec.{low}x{low}_in0", "middle.0", _heads)
        self._stage(f"dec.{low}x{low}_in1", "middle.1", _heads)
        place = 0
        for level, r in reversed(list(enumerate(sizes))):
            for i in range(self.blocks + 1):
                self._stage(f"dec.{r}x{r}_block{i}", f"decoder.{place}", _heads)
                place += 1
            if level:
                self._block(f"dec.{2 * r}x{2 * r}_up", f"decoder.{place - 1}.up", None)
        self._both("out_norm", "norm_out")
        self._both("out_conv", "last")
        return config

    def _both(self, theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            self.taken.take(f"model.{theirs}.{kind}", f"{ours}.{kind}")

    def _stage(self, theirs: str, ours: str, heads: Callable[[int], int]) -> None:
        self._block(theirs, f"{ours}.block", heads, f"{ours}.attention")

    def _block(self, theirs: str, ours: str, heads: Callable[[int], int] | None, attention: str = "") -> None:
        for one, other in _PARTS.items():
            self._both(f"{theirs}.{one}", f"{ours}.{other}")
        if f"model.{theirs}.skip.weight" in self.taken:
            self._both(f"{theirs}.skip", f"{ours}.skip")
        if heads is None or f"model.{theirs}.qkv.weight" not in self.taken:
            return
        self._both(f"{theirs}.norm2", f"{attention}.norm")
        self._both(f"{theirs}.proj", f"{attention}.proj")
        for kind in ("weight", "bias"):
            rows = self.taken.pop(f"model.{theirs}.qkv.{kind}")
            self.taken.put(f"{attention}.qkv.{kind}", by_parts(rows, "head channel qkv", heads(len(rows) // 3)))


def _one_head(channels: int) -> int:
    return 1


def _heads(channels: int) -> int:
    return max(1, channels // _HEAD_CHANNELS)
