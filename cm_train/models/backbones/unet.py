"""The ADM U-Net of Dhariwal & Nichol 2021, as OpenAI's consistency models use it."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ...core.errors import InputError
from ...core.registry import register
from ...core.settings import OF_RECIPE
from .base import BackboneConfig, Block, KeyedDropout, autocast_off, sinusoidal_embedding
from .blocks import Count, GroupNorm, attention, check_halves, check_labels, num_heads, resample

Fraction = Annotated[float, Field(gt=0, lt=1024)]


class UNetConfig(BackboneConfig):
    """The `backbone` group for `name: unet`."""

    name: Literal["unet"] = "unet"
    channels: Annotated[int, Field(ge=2, le=16384, multiple_of=2)] = 192  # base width M; the embedding has 4 M
    # one level a number, finest first; a fraction where it makes a whole width
    channel_mult: Annotated[list[Count | Fraction], Field(min_length=1, max_length=12)] = [1, 2, 3, 4]
    num_blocks: Annotated[int, Field(ge=1, le=64)] = 3  # residual blocks per level
    attention_resolutions: Annotated[list[Count], Field(max_length=12)] = [32, 16, 8]
    head_channels: Count = 64
    num_heads: Count | None = None  # of each attention, whatever its width; None: as many as head_channels make
    group_channels: Count | None = None  # channels per norm group; None: 32 groups, as published
    # dropout only where features are at most this wide; None: everywhere
    dropout_max_size: Annotated[Count | None, OF_RECIPE] = None
    scale_shift: bool = True  # the embedding scales and shifts after the norm, else it is added before
    # Scale and shift are each divided by their root mean square over the channels: Lu & Song 2024 (sCM), section 4.1.
    embedding_norm: bool = False
    # Up and down inside residual blocks, as in the published files; else beside them, up by nearest neighbours with a
    # convolution, and down by 2 x 2 means, or by the published code's convolution of stride 2.
    resample_in_block: bool = True
    strided_conv: bool = False
    # c_noise is multiplied by this before the embedding. 1 suits iCT, ECT and sCM; OpenAI's weights want 1000.
    noise_multiplier: Annotated[float, Field(gt=0, le=1e6)] = 1.0

    def model_post_init(self, _: Any) -> None:
        if self.embedding_norm and not self.scale_shift:
            raise ValueError("embedding_norm needs scale_shift=true")
        if self.strided_conv and self.resample_in_block:
            raise ValueError("strided_conv needs resample_in_block=false")
        for mult in self.channel_mult:
            if mult * self.channels % 1:
                raise ValueError(f"channel_mult {mult} of {self.channels} channels is no whole width")

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [round(mult * self.channels) for mult in self.channel_mult]


class _Norm(GroupNorm):
    """GroupNorm of as many groups as the settings say."""

    def __init__(self, channels: int, config: UNetConfig):
        groups = 32 if config.group_channels is None else max(1, channels // config.group_channels)
        if channels % groups:
            raise InputError(
                "the norm's groups must divide the width",
                f"{channels} channels in {groups} groups",
                fix="set backbone.group_channels to a divisor of every level's width",
            )
        super().__init__(groups, channels, eps=1e-5)


def _unit(x: Tensor) -> Tensor:
    """x [B, C, 1, 1] divided by its root mean square over the channels."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def _zero(module: nn.Module) -> None:
    """Zero weight and bias, so that the branch that ends here starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class ResBlock(Block):
    """norm, SiLU, (resample), conv; embedding; norm, SiLU, dropout, conv; plus the (resampled) input."""

    def __init__(
        self, cin: int, cout: int, resolution: int, embedding: int, config: UNetConfig, salt: int, resample: str = ""
    ):
        super().__init__()
        self.resample, self.scale_shift, self.embedding_norm = resample, config.scale_shift, config.embedding_norm
        self.norm_in, self.conv_in = _Norm(cin, config), nn.Conv2d(cin, cout, 3, padding=1)
        self.embed = nn.Linear(embedding, cout * (2 if config.scale_shift else 1))
        self.norm_out, self.conv_out = _Norm(cout, config), nn.Conv2d(cout, cout, 3, padding=1)
        drops = config.dropout_max_size is None or resolution <= config.dropout_max_size
        self.dropout = KeyedDropout(config.dropout if drops else 0.0, (cout, resolution, resolution), salt)
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)
        _zero(self.conv_out)

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        h = F.silu(self.norm_in(x))
        if self.resample:
            h, x = resample(h, self.resample), resample(x, self.resample)
        h = self.conv_in(h)
        with autocast_off(h):
            e = self.embed(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            scale, shift = (_unit(scale), _unit(shift)) if self.embedding_norm else (1 + scale, shift)
            h = torch.addcmul(shift.to(h.dtype), self.norm_out(h), scale.to(h.dtype))
        else:
            h = self.norm_out(h + e.to(h.dtype))
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h), keys))


class Resample(nn.Module):
    """Resampling outside a residual block: up before a convolution, down by means or by a strided convolution."""

    def __init__(self, channels: int, direction: str, strided: bool):
        super().__init__()
        by_conv = strided and direction == "down"
        self.direction = "" if by_conv else direction
        stride, convolves = (2 if by_conv else 1), by_conv or direction == "up"
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1) if convolves else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(resample(x, self.direction))


class Attention(Block):
    """Self-attention over the pixels, with a residual; qkv rows ordered (q|k|v, head, channel)."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.heads = num_heads(channels, config.head_channels, config.num_heads)
        self.norm = _Norm(channels, config)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        _zero(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(attention(self.qkv(self.norm(x)), self.heads))


class _Stage(nn.Module):
    """A residual block, then attention or resampling where the position asks for it."""

    def __init__(self, block: ResBlock | Resample, attention: Attention | None = None, up: nn.Module | None = None):
        super().__init__()
        self.block, self.attention, self.up = block, attention, up

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        x = self.block(x, embedding, keys) if isinstance(self.block, ResBlock) else self.block(x)
        if self.attention is not None:
            x = self.attention(x)
        if self.up is not None:
            x = self.up(x, embedding, keys) if isinstance(self.up, ResBlock) else self.up(x)
        return x


@register
class UNet(nn.Module):
    """F(x, c_noise, labels): encoder with skips, middle, decoder.

    Args:
        config: sizes; the defaults are the published ImageNet-64 network (295,899,267 parameters with classes).
        image_size: side of the square images, divisible by 2^(levels - 1).
        image_channels: 1 or 3.
        num_classes: 0 for no class conditioning.
    """

    Config = UNetConfig

    def __init__(self, config: UNetConfig, image_size: int, image_channels: int, num_classes: int = 0):
        super().__init__()
        levels = len(config.channel_mult)
        check_halves(image_size, levels)
        self.config, self.num_classes = config, num_classes
        width, embedding = config.channels, 4 * config.channels
        self.embed_in, self.embed_out = nn.Linear(width, embedding), nn.Linear(embedding, embedding)
        self.embed_label = nn.Embedding(num_classes, embedding) if num_classes else None

        salt = iter(range(10_000))

        def block(cin: int, cout: int, res: int, resample: str = "") -> ResBlock:
            return ResBlock(cin, cout, res, embedding, config, next(salt), resample)

        def attend(c: int, res: int) -> Attention | None:
            return Attention(c, config) if res in config.attention_resolutions else None

        def resampler(c: int, res: int, direction: str) -> ResBlock | Resample:
            return (
                block(c, c, res, direction) if config.resample_in_block else Resample(c, direction, config.strided_conv)
            )

        widths = config.widths
        c, res = widths[0], image_size
        self.first = nn.Conv2d(image_channels, c, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        skips = [c]
        for level, out in enumerate(widths):
            for _ in range(config.num_blocks):
                self.encoder.append(_Stage(block(c, out, res), attend(out, res)))
                c = out
                skips.append(c)
            if level < levels - 1:
                res //= 2
                self.encoder.append(_Stage(resampler(c, res, "down")))
                skips.append(c)
        self.middle = nn.ModuleList([_Stage(block(c, c, res), Attention(c, config)), _Stage(block(c, c, res))])
        for level, out in reversed(list(enumerate(widths))):
            for i in range(config.num_blocks + 1):
                stage = _Stage(block(c + skips.pop(), out, res), attend(out, res))
                if level and i == config.num_blocks:
                    res *= 2
                    stage.up = resampler(out, res, "up")
                self.decoder.append(stage)
                c = out
        self.norm_out, self.last = _Norm(c, config), nn.Conv2d(c, image_channels, 3, padding=1)
        _zero(self.last)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], c_noise [B], labels int64 [B] or None, dropout_keys int32 [B, 2] or None."""
        check_labels(labels, self.num_classes)
        e = sinusoidal_embedding(c_noise * self.config.noise_multiplier, self.config.channels)
        with autocast_off(x):
            e = self.embed_out(F.silu(self.embed_in(e)))
        if self.embed_label is not None:
            e = e + self.embed_label(labels)
        e = F.silu(e)  # every block starts from SiLU(embedding)

        keys = dropout_keys if self.config.dropout > 0 else None
        h = self.first(x.to(memory_format=torch.channels_last))
        skips = [h]
        for stage in self.encoder:
            h = stage(h, e, keys)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, e, keys)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], dim=1), e, keys)
        return self.last(F.silu(self.norm_out(h)))
