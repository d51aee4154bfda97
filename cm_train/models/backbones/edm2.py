"""The magnitude-preserving U-Net of Karras et al. 2024 (EDM2), their configuration G."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ...core.registry import register
from ...core.settings import OF_RECIPE
from .base import (
    BackboneConfig,
    Block,
    Constrained,
    KeyedDropout,
    at_least_float32,
    autocast_off,
    sinusoidal_embedding,
)
from .blocks import Count, Resampling, check_halves, check_labels, num_heads, resample

Balance = Annotated[float, Field(ge=0, le=1)]  # of a sum of two: the share of the second

_EPS = 1e-4  # added to each magnitude that something is divided by
_SILU = 0.596  # the root mean square of SiLU of a unit normal


class EDM2Config(BackboneConfig):
    """The `backbone` group for `name: edm2`."""

    name: Literal["edm2"] = "edm2"
    channels: Annotated[int, Field(ge=2, le=16384, multiple_of=2)] = 128  # base width M
    # one level a number, finest first; the embedding is as wide as the widest
    channel_mult: Annotated[list[Count], Field(min_length=1, max_length=12)] = [1, 2, 3, 4]
    num_blocks: Annotated[int, Field(ge=1, le=64)] = 3  # residual blocks per level
    attention_resolutions: Annotated[list[Count], Field(max_length=12)] = [16, 8]
    head_channels: Count = 64
    # dropout only where features are at most this wide; None: everywhere
    dropout_max_size: Annotated[Count | None, OF_RECIPE] = None
    # Of the noise level: random Fourier features, as published; or sines and cosines of low frequencies, which sCM
    # asks for (Lu & Song 2024, section 4.1): the derivative along the noise level grows with the frequencies.
    noise_embedding: Literal["fourier", "positional"] = "fourier"
    label_balance: Balance = 0.5  # noise level (0) and class (1)
    concat_balance: Balance = 0.5  # features from below (0) and the skip's (1)
    res_balance: Balance = 0.3  # main path (0) and residual branch (1)
    attn_balance: Balance = 0.3  # main path (0) and attention (1)
    clip: Annotated[float, Field(gt=0)] | None = 256.0  # the largest feature that leaves a block; None: any


def normalized(x: Tensor, dim: int = 1) -> Tensor:
    """`x` divided by its root mean square along `dim`, taken in float32 at least; over the channels: pixel norm."""
    return x / (_EPS + _norm(x, dim) / math.sqrt(x.shape[dim])).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that gives unit variance for a unit normal `x` (eq. 81)."""
    return F.silu(x) / _SILU


def mp_sum(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """(1 - balance) a + balance b, divided by what that is in magnitude where a and b have none in common (eq. 88)."""
    return a.lerp(b, balance) / math.hypot(1 - balance, balance)


def mp_cat(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """a and b [B, C, H, W] one after the other, with shares in what follows that don't hang on their widths (eq. 103).

    For `balance` from 0 (a alone counts) to 1; the magnitude of the whole is kept.
    """
    wide_a, wide_b = a.shape[1], b.shape[1]
    scale = math.sqrt((wide_a + wide_b) / ((1 - balance) ** 2 + balance**2))
    scale_a, scale_b = scale * (1 - balance) / math.sqrt(wide_a), scale * balance / math.sqrt(wide_b)
    return torch.cat([a * scale_a, b * scale_b], dim=1)


def _norm(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)


class MPLayer(Constrained):
    """A linear layer without bias, or a convolution that keeps the image's size, of rows of unit magnitude (eq. 47).

    Each output's weights are divided by their norm on the fly, whatever they are, so that their length changes nothing
    and the gradient is at right angles to them. Adam would then make them longer with each step, and the steps so
    shorter in effect. `constrain` takes that growth back: forced weight normalisation (eq. 66). The network's function
    stays the same; hence it may wait for the optimizer's step, and a forward pass writes nothing.

    Args:
        cin, cout: widths.
        kernel: side of the convolution's kernel, odd; 0 for a linear layer.
    """

    def __init__(self, cin: int, cout: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *([kernel, kernel] if kernel else [])))
        with torch.no_grad():
            self.constrain()

    def constrain(self, applied: Tensor | None = None) -> None:
        size = _EPS + _norm(self.weight, self._inputs) / math.sqrt(self.weight[0].numel())
        self.weight.div_(size if applied is None else torch.where(applied > 0, size, 1.0))

    @property
    def _inputs(self) -> tuple[int, ...]:
        return tuple(range(1, self.weight.ndim))

    def unit_rows(self) -> Tensor:
        """The weights with rows of norm 1: unit variance in, unit variance out."""
        root = math.sqrt(self.weight[0].numel())
        return self.weight / (_EPS * root + _norm(self.weight, self._inputs))

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] or [B, C]; gain: 0-dim, learned."""
        weight = self.unit_rows() if gain is None else self.unit_rows() * gain
        return F.linear(x, weight) if x.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPFourier(nn.Module):
    """sqrt(2) cos(frequency c + phase) for fixed random frequencies and phases (eq. 75); [B] -> [B, width]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))  # stored with the weights: they are no formula
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, c: Tensor) -> Tensor:
        return math.sqrt(2) * (at_least_float32(c)[:, None] * self.freqs + self.phases).cos()


class MPPositional(nn.Module):
    """Cosines and sines of low frequencies with unit magnitude; [B] -> [B, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, c: Tensor) -> Tensor:
        return math.sqrt(2) * sinusoidal_embedding(c, self.width)


class MPAttention(nn.Module):
    """Attention of a pixel to all, its queries, keys and values of unit magnitude; rows ordered (q|k|v, head, channel).

    Their code orders rows (head, channel, q|k|v), which would leave the channels of a head apart in memory, where no
    fused attention takes them.
    """

    def __init__(self, channels: int, config: EDM2Config):
        super().__init__()
        self.heads, self.balance = num_heads(channels, config.head_channels), config.attn_balance
        self.qkv, self.proj = MPLayer(channels, 3 * channels, 1), MPLayer(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = normalized(qkv, 3).transpose(-1, -2).unbind(1)  # [B, heads, pixels, head channels]
        out = F.scaled_dot_product_attention(q, k, v)
        return mp_sum(x, self.proj(out.transpose(-1, -2).reshape(b, c, h, w)), self.balance)


class MPBlock(Block):
    """A block of figure 21: resampling, residual branch, attention, clipping.

    In the encoder the main path is normalised at the start of each block; in the decoder it is not, and takes a skip.

    Args:
        cin, cout: widths; in the decoder `cin` counts the skip.
        takes_skip: whether it is given an encoder's features.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        resolution: int,
        embedding: int,
        config: EDM2Config,
        salt: int,
        resampling: Resampling = "",
        in_encoder: bool = False,
        takes_skip: bool = False,
        attends: bool = False,
    ):
        super().__init__()
        self.in_encoder, self.resampling, self.takes_skip = in_encoder, resampling, takes_skip
        self.concat_balance, self.res_balance, self.clip = config.concat_balance, config.res_balance, config.clip
        self.skip = nn.Identity() if cin == cout else MPLayer(cin, cout, 1)
        self.conv_in, self.conv_out = MPLayer(cout if in_encoder else cin, cout, 3), MPLayer(cout, cout, 3)
        self.embed = MPLayer(embedding, cout)
        drops = config.dropout_max_size is None or resolution <= config.dropout_max_size
        self.dropout = KeyedDropout(config.dropout if drops else 0.0, (cout, resolution, resolution), salt)
        self.attention = MPAttention(cout, config) if attends else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor | None, embedding: Tensor, gain: Tensor, keys: Tensor | None) -> Tensor:
        if skip is not None:
            x = mp_cat(x, skip, self.concat_balance)
        x = resample(x, self.resampling)
        if self.in_encoder:
            x = normalized(self.skip(x))
        y = self.conv_in(mp_silu(x))
        with autocast_off(y):
            scale = 1 + self.embed(embedding, gain)[:, :, None, None]
        y = self.dropout(mp_silu(y * scale.to(y.dtype)), keys)
        x = mp_sum(x if self.in_encoder else self.skip(x), self.conv_out(y), self.res_balance)
        x = self.attention(x)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


class Gains(nn.Module):
    """The learned scalars, which start at zero: how far the embedding reaches into each block, then the output's.

    In one vector, behind all other weights: a number between two layers would move the second off the boundaries of
    sixteen bytes that GPUs read at once, and have blocks of one kind compiled four times.
    """

    def __init__(self, count: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(count))


@register
class EDM2(nn.Module):
    """F(x, c_noise, labels): encoder with skips, decoder; no biases, no norm layers but pixel norm in the encoder.

    Karras et al. 2024 (Analyzing and improving the training dynamics of diffusion models), appendix B and figure 21.
    Their loss's uncertainty u(sigma) is the objective's: see `objective.weighting=learned` of mode=edm.

    Args:
        config: sizes; the defaults are the published XS.
        image_size: side of the square images (or latents), divisible by 2^(levels - 1).
        image_channels: of the images; the network adds one of ones.
        num_classes: 0 for no class conditioning.
    """

    Config = EDM2Config

    def __init__(self, config: EDM2Config, image_size: int, image_channels: int, num_classes: int = 0):
        super().__init__()
        levels = len(config.channel_mult)
        check_halves(image_size, levels)
        self.config, self.num_classes = config, num_classes
        widths = [mult * config.channels for mult in config.channel_mult]
        embedding = max(widths)
        self.noise = (MPFourier if config.noise_embedding == "fourier" else MPPositional)(widths[0])
        self.embed_noise = MPLayer(widths[0], embedding)
        self.embed_label = MPLayer(num_classes, embedding) if num_classes else None
        self.first = MPLayer(image_channels + 1, widths[0], 3)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()

        salt = iter(range(10_000))

        def block(cin: int, cout: int, res: int, resampling: Resampling = "", **kind: bool) -> MPBlock:
            return MPBlock(cin, cout, res, embedding, config, next(salt), resampling, **kind)

        c = widths[0]
        skips = [c]
        for level, width in enumerate(widths):
            res = image_size >> level
            attends = res in config.attention_resolutions
            if level:
                self.encoder.append(block(c, c, res, "down", in_encoder=True))
                skips.append(c)
            for _ in range(config.num_blocks):
                self.encoder.append(block(c, width, res, in_encoder=True, attends=attends))
                c = width
                skips.append(c)
        self.decoder.extend([block(c, c, res, attends=True), block(c, c, res)])
        for level, width in reversed(list(enumerate(widths))):
            res = image_size >> level
            attends = res in config.attention_resolutions
            if level < levels - 1:
                self.decoder.append(block(c, c, res, "up"))
            for _ in range(config.num_blocks + 1):
                self.decoder.append(block(c + skips.pop(), width, res, takes_skip=True, attends=attends))
                c = width
        self.last = MPLayer(c, image_channels, 3)
        self.gains = Gains(len(self.encoder) + len(self.decoder) + 1)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], c_noise [B], labels int64 [B] or None, dropout_keys int32 [B, 2] or None."""
        check_labels(labels, self.num_classes)
        with autocast_off(x):
            e = self.embed_noise(self.noise(c_noise))
            if self.embed_label is not None:
                # What a one-hot label of unit magnitude, which is sqrt(K) long, picks from the normalised weights.
                columns = self.embed_label.unit_rows() * math.sqrt(self.num_classes)
                e = mp_sum(e, F.embedding(labels, columns.t()), self.config.label_balance)  # type: ignore[arg-type]
            e = mp_silu(e)

        keys = dropout_keys if self.config.dropout > 0 else None
        # Of a copy: parts of a parameter itself ask for a gradient under no_grad too, for which all would compile anew.
        gains = iter(self.gains.values.clone().unbind())
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # in place of biases
        h = self.first(h.to(memory_format=torch.channels_last))
        skips = [h]
        for block in self.encoder:
            h = block(h, None, e, next(gains), keys)
            skips.append(h)
        for block in self.decoder:
            h = block(h, skips.pop() if block.takes_skip else None, e, next(gains), keys)
        return self.last(h, next(gains))
