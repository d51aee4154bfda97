"""DDPM++ and NCSN++ of Song et al. 2021 (Score-based generative modeling), as Karras et al. 2022 (EDM) have them."""

import itertools
import math
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ...core.errors import InputError
from ...core.registry import register
from ...core.settings import OF_RECIPE
from .base import BackboneConfig, Block, KeyedDropout, at_least_float32, autocast_off
from .blocks import Count, GroupNorm, attention, check_halves, check_labels, num_heads, resample

L = TypeVar("L", nn.Conv2d, nn.Linear)
_ROOT_HALF = math.sqrt(0.5)  # a sum of two parts is scaled by it, so that its variance does not grow with depth
_ALMOST_ZERO = 1e-5  # the gain of what ends a branch, so that the branch starts as next to nothing


class SongUNetConfig(BackboneConfig):
    """The `backbone` group for `name: songunet`; the defaults are EDM's DDPM++ for CIFAR-10."""

    name: Literal["songunet"] = "songunet"
    channels: Annotated[int, Field(ge=4, le=16384, multiple_of=4)] = 128  # base width M; the embedding has 4 M
    # one level a number, finest first
    channel_mult: Annotated[list[Count], Field(min_length=1, max_length=12)] = [2, 2, 2]
    num_blocks: Annotated[int, Field(ge=1, le=64)] = 4  # residual blocks per level
    # Every block of the encoder, and the last one of the decoder, at these; the coarsest level has attention anyway.
    attention_resolutions: Annotated[list[Count], Field(max_length=12)] = [16]
    head_channels: Count | None = None  # None: one head of the full width, as published
    # dropout only where features are at most this wide; None: everywhere
    dropout_max_size: Annotated[Count | None, OF_RECIPE] = None
    # Sines of width M at fixed frequencies (DDPM++), or of width 2 M at random ones, stored with the weights (NCSN++).
    embedding: Literal["positional", "fourier"] = "positional"
    # Standard deviation of the random frequencies: 16 as published; iCT (Song & Dhariwal 2023) has 0.02.
    fourier_scale: Annotated[float, Field(gt=0, le=1e4)] = 16.0
    # "skip" and "residual" feed the image, made smaller, to each level; the latter by convolutions (NCSN++).
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"  # "skip" sums an image from each level
    # Of up and down, one dimension: [1, 1] is the mean of two (DDPM++), NCSN++ has [1, 3, 3, 1].
    resample_filter: Annotated[list[float], Field(min_length=2, max_length=16)] = [1.0, 1.0]
    augment_dim: Annotated[int, Field(ge=0, le=1024)] = 0  # numbers that say how an image was augmented; EDM has 9

    @property
    def num_augment_labels(self) -> int:
        """See the base class."""
        return self.augment_dim

    def model_post_init(self, _: Any) -> None:
        taps = self.resample_filter
        if len(taps) % 2 or sum(taps) <= 0:
            allowed = "an even number of them, whose sum is above 0"
            raise InputError("backbone.resample_filter has no such numbers", f"{taps}", allowed)
        near = [1, *self.channel_mult]  # the decoder joins features of two levels that follow each other
        widths = {*near, *(2 * m for m in self.channel_mult), *(a + b for a, b in itertools.pairwise(near))}
        for width in sorted(self.channels * m for m in widths):
            if width % (groups := _num_groups(width)):
                raise InputError(
                    "norm groups must divide every layer's width",
                    f"backbone.channels={self.channels}, which makes one of {width} in {groups} groups",
                    fix="set backbone.channels to a multiple of 32",
                )


def _num_groups(channels: int) -> int:
    return min(32, max(1, channels // 4))


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(_num_groups(channels), channels, eps=1e-6)


def _conv(cin: int, cout: int, side: int, gain: float = 1.0, padding: int | None = None) -> nn.Conv2d:
    layer = nn.Conv2d(cin, cout, side, padding=side // 2 if padding is None else padding)
    return _initialised(layer, gain)


def _linear(cin: int, cout: int, bias: bool = True) -> nn.Linear:
    return _initialised(nn.Linear(cin, cout, bias))


def _initialised(layer: L, gain: float = 1.0) -> L:
    """Uniform weights of Glorot & Bengio 2010, and no bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Resample(nn.Module):
    """Half or twice the size by a separable filter of unit sum, zeros beyond the edge.

    Args:
        taps: of the filter, an even number.
        direction: "up" or "down".
        padding: zeros on each side before going down; None: as many as make exactly half the size.
    """

    kernel: Tensor | None

    def __init__(self, taps: list[float], direction: str, padding: int | None = None):
        super().__init__()
        self.direction, self.padding = direction, (len(taps) - 1) // 2 if padding is None else padding
        line = torch.tensor(taps, dtype=torch.float32)
        kernel = None if len(taps) == 2 and taps[0] == taps[1] else torch.outer(line, line) / line.sum() ** 2
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return resample(x, self.direction)
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)  # each channel by itself
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=self.padding, groups=channels)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=self.padding, groups=channels)


class ResBlock(Block):
    """norm, SiLU, (resample), conv; plus embedding; norm, SiLU, dropout, conv; plus the (resampled) input; scaled."""

    def __init__(
        self, cin: int, cout: int, size: int, embedding: int, config: SongUNetConfig, salt: int, direction: str = ""
    ):
        super().__init__()
        self.norm_in, self.conv_in = _norm(cin), _conv(cin, cout, 3)
        self.resample = Resample(config.resample_filter, direction) if direction else None
        self.embed = _linear(embedding, cout)
        self.norm_out, self.conv_out = _norm(cout), _conv(cout, cout, 3, _ALMOST_ZERO)
        drops = config.dropout_max_size is None or size <= config.dropout_max_size
        self.dropout = KeyedDropout(config.dropout if drops else 0.0, (cout, size, size), salt)
        self.skip = _conv(cin, cout, 1) if cin != cout or direction else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        h = F.silu(self.norm_in(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h)
        with autocast_off(h):
            e = self.embed(embedding)[:, :, None, None]
        h = F.silu(self.norm_out(h + e.to(h.dtype)))
        return (self.skip(x) + self.conv_out(self.dropout(h, keys))) * _ROOT_HALF


class Attention(Block):
    """Self-attention over the pixels, plus the input; scaled. qkv rows are ordered (q|k|v, head, channel)."""

    def __init__(self, channels: int, config: SongUNetConfig):
        super().__init__()
        self.heads = 1 if config.head_channels is None else num_heads(channels, config.head_channels)
        self.norm, self.qkv = _norm(channels), _conv(channels, 3 * channels, 1, math.sqrt(0.2))
        self.proj = _conv(channels, channels, 1, _ALMOST_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.proj(attention(self.qkv(self.norm(x)), self.heads))) * _ROOT_HALF


class Pyramid(Block):
    """The smaller image, of `encoder=residual`: made smaller still by a convolution, and the features added; scaled."""

    def __init__(self, cin: int, cout: int, config: SongUNetConfig):
        super().__init__()
        # The filter's zeros are added before the convolution, so that it sees its answers beyond the edge too.
        self.conv = _conv(cin, cout, 3, padding=1 + (len(config.resample_filter) - 1) // 2)
        self.resample = Resample(config.resample_filter, "down", padding=0)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        return (h + self.resample(self.conv(image))) * _ROOT_HALF


class _Stage(nn.Module):
    """A residual block, then attention where the position asks for it."""

    def __init__(self, block: ResBlock, attention: Attention | None = None):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        x = self.block(x, embedding, keys)
        return x if self.attention is None else self.attention(x)


class _Head(nn.Module):
    """Features to an image."""

    def __init__(self, channels: int, image_channels: int):
        super().__init__()
        self.norm, self.conv = _norm(channels), _conv(channels, image_channels, 3, _ALMOST_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


@register
class SongUNet(nn.Module):
    """F(x, c_noise, labels): encoder with skips, middle, decoder; Song et al. 2021, appendix H, with EDM's sizes.

    Lists have an entry a level, finest first: `encoder[l]` and `decoder[l]` are stages at size image_size / 2^l,
    `down[l - 1]` leads there, `up[l]` comes back there.

    Args:
        config: sizes; the defaults are the published CIFAR-10 DDPM++ (55,733,891 parameters with augment_dim=9).
        image_size: side of the square images, divisible by 2^(levels - 1).
        image_channels: 1 or 3.
        num_classes: 0 for no class conditioning.
    """

    Config = SongUNetConfig
    frequencies: Tensor

    def __init__(self, config: SongUNetConfig, image_size: int, image_channels: int, num_classes: int = 0):
        super().__init__()
        levels = len(config.channel_mult)
        check_halves(image_size, levels)
        self.config, self.num_classes = config, num_classes
        width, embedding, fourier = config.channels, 4 * config.channels, config.embedding == "fourier"
        noise = 2 * width if fourier else width
        self.register_buffer("frequencies", _frequencies(noise // 2, config), persistent=fourier)
        self.embed_label = _linear(num_classes, noise) if num_classes else None
        self.embed_augment = _linear(config.augment_dim, noise, bias=False) if config.augment_dim else None
        self.embed_in, self.embed_out = _linear(noise, embedding), _linear(embedding, embedding)

        salt = itertools.count()
        widths, sizes = [width * m for m in config.channel_mult], [image_size >> level for level in range(levels)]

        def stage(cin: int, cout: int, level: int, attends: bool = False, direction: str = "") -> _Stage:
            block = ResBlock(cin, cout, sizes[level], embedding, config, next(salt), direction)
            return _Stage(block, Attention(cout, config) if attends else None)

        listed = [size in config.attention_resolutions for size in sizes]
        self.first = _conv(image_channels, width, 3)
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        c, skips = width, [width]
        for level, cout in enumerate(widths):
            if level:
                self.down.append(stage(c, c, level, direction="down"))
                skips.append(c)
            cins = [c] + [cout] * (config.num_blocks - 1)
            self.encoder.append(nn.ModuleList(stage(cin, cout, level, listed[level]) for cin in cins))
            skips += [cout] * config.num_blocks
            c = cout
        self.pyramid = nn.ModuleList()
        self.shrink: Resample | None = None
        if config.encoder == "residual":
            ends = [image_channels, *widths[:-1]]
            self.pyramid.extend(Pyramid(cin, cout, config) for cin, cout in itertools.pairwise(ends))
        elif config.encoder == "skip":
            self.pyramid.extend(_conv(image_channels, cout, 1) for cout in widths[:-1])
            self.shrink = Resample(config.resample_filter, "down")

        self.middle = nn.ModuleList([stage(c, c, levels - 1, attends=True), stage(c, c, levels - 1)])
        ups, decoder = [], []
        for level, cout in reversed(list(enumerate(widths))):
            if level < levels - 1:
                ups.append(stage(c, c, level, direction="up"))
            stages = []
            for i in range(config.num_blocks + 1):
                stages.append(stage(c + skips.pop(), cout, level, listed[level] and i == config.num_blocks))
                c = cout
            decoder.append(nn.ModuleList(stages))
        self.up, self.decoder = nn.ModuleList(reversed(ups)), nn.ModuleList(reversed(decoder))
        self.heads = nn.ModuleList(
            _Head(c, image_channels) for c in (widths if config.decoder == "skip" else widths[:1])
        )
        self.grow = Resample(config.resample_filter, "up") if config.decoder == "skip" else None

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The network's answer [B, C, H, W].

        Args:
            x: [B, C, H, W].
            c_noise: [B].
            labels: int64 [B], or None for a network without classes.
            dropout_keys: int32 [B, 2], or None for no dropout.
            augment_labels: [B, augment_dim], how each image was augmented; None says that it was not, as zeros do.
        """
        check_labels(labels, self.num_classes)
        with autocast_off(x):
            e = self._embedding(c_noise, labels, augment_labels)
        keys = dropout_keys if self.config.dropout > 0 else None
        h = image = x.to(memory_format=torch.channels_last)
        h = self.first(h)
        skips = [h]
        for level, stages in enumerate(self.encoder):
            if level:
                h = self.down[level - 1](h, e, keys)
                if self.shrink is not None:
                    image = self.shrink(image)
                    h = h + self.pyramid[level - 1](image)
                elif self.pyramid:
                    h = image = self.pyramid[level - 1](image, h)
                skips.append(h)
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(h, e, keys)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, e, keys)
        answer: Tensor | None = None
        for level in reversed(range(len(self.decoder))):
            if level < len(self.up):
                h = self.up[level](h, e, keys)
            for stage in self.decoder[level]:  # type: ignore[attr-defined]
                h = stage(torch.cat([h, skips.pop()], dim=1), e, keys)
            if level < len(self.heads):
                part = self.heads[level](h)
                answer = part if answer is None or self.grow is None else self.grow(answer) + part
        assert answer is not None, "the finest level has a head"
        return answer

    def _embedding(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """What every block is told, [B, 4 M]: of the noise level, and the class and augmentation where there are."""
        angles = at_least_float32(c_noise)[:, None] * self.frequencies
        if self.config.embedding == "fourier":
            angles = angles * (2 * math.pi)
        e = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.embed_label is not None and labels is not None:
            columns = F.embedding(labels, self.embed_label.weight.T)  # of a one-hot label
            e = e + columns * math.sqrt(self.num_classes) + self.embed_label.bias
        if self.embed_augment is None:
            if augment_labels is not None:
                raise InputError(
                    "this network is not told of augmentation",
                    "augment_labels",
                    "networks with backbone.augment_dim above 0",
                )
        else:
            # Zeros in the place of None: the data-parallel wrapper wants a gradient of every weight.
            given = e.new_zeros(len(e), self.config.augment_dim) if augment_labels is None else augment_labels
            if given.shape != (len(e), self.config.augment_dim):
                shape = f"[{len(e)}, {self.config.augment_dim}]"
                raise InputError("augment_labels don't fit", f"shape {list(given.shape)}", shape)
            e = e + self.embed_augment(given.to(e.dtype))
        return F.silu(self.embed_out(F.silu(self.embed_in(e))))


def _frequencies(count: int, config: SongUNetConfig) -> Tensor:
    """Of the noise level's sines, [count]: falling geometrically from 1 to 1e-4, or normally distributed."""
    if config.embedding == "fourier":
        return torch.randn(count) * config.fourier_scale
    return torch.logspace(0, -4, count)
