"""A backbone made into a denoiser by preconditioning."""

import itertools
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core import registry
from ..core.errors import InputError
from ..core.settings import Settings
from .backbones.base import BackboneConfig
from .noise_levels import Rho, Sigma


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], so that one scalar an image meets images of `like`'s rank."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class SamplingConfig(Settings):
    """The `sampling` group: how a checkpoint is sampled where nobody says otherwise."""

    num_scales: Annotated[int, Field(ge=2, le=1_000_000)] = 40  # points of the grid that samplers pick levels from
    # number of steps -> as many noise levels, descending, for multistep sampling
    points: dict[Annotated[int, Field(ge=1, le=1000)], list[Sigma]] = {}

    def model_post_init(self, _: Any) -> None:
        for steps, levels in self.points.items():
            if len(levels) != steps or any(a <= b for a, b in itertools.pairwise(levels)):
                raise ValueError(f"points for {steps} steps must be {steps} descending noise levels")

    def check_above(self, sigma_min: float) -> None:
        """Refuse points below `sigma_min`. Raises InputError."""
        lowest = min((levels[-1] for levels in self.points.values()), default=sigma_min)
        if lowest < sigma_min:
            raise InputError("sampling.points below sigma_min", lowest, f"noise levels of at least {sigma_min}")


# How a network is told the noise level: ln(sigma) / 4 (EDM), or TrigFlow's angle atan(sigma / sigma_data).
CNoise = Literal["log_sigma", "angle"]
# What the denoised image is: the mean of all that the noisy one may have been, or the end of its path down the ODE.
Kind = Literal["diffusion", "consistency"]
# The noise level at which a denoiser is the identity: its coefficients are Karras et al.'s, or Song et al.'s.
Boundary = Literal["zero", "sigma_min"]
LONGEST_NAME = 255  # of a class, in characters


class DenoiserConfig(Settings):
    """What a denoiser needs beside its backbone's sizes; stored with every checkpoint."""

    kind: Kind
    boundary: Boundary
    c_noise: CNoise = "log_sigma"
    image_size: Annotated[int, Field(ge=1, le=4096)]
    image_channels: Annotated[int, Field(ge=1, le=4096)]
    num_classes: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    class_names: list[Annotated[str, Field(max_length=LONGEST_NAME)]] = []  # one a label; empty: not known
    null_label: bool = False  # whether there is one more label, num_classes, which means no class
    sigma_data: Sigma
    sigma_min: Sigma
    sigma_max: Sigma
    rho: Rho = 7.0
    sampling: SamplingConfig = SamplingConfig()

    def model_post_init(self, _: Any) -> None:
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max must exceed sigma_min={self.sigma_min}")
        if self.kind == "diffusion" and self.boundary != "zero":
            raise ValueError(f"the boundary of a diffusion model is zero, not {self.boundary}")
        if self.null_label and not self.num_classes:
            raise ValueError("null_label needs classes")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for {self.num_classes} classes")
        self.sampling.check_above(self.sigma_min)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        return self.image_channels, self.image_size, self.image_size

    @property
    def sigma_boundary(self) -> float:
        """The noise level of the boundary, where D is the identity; a consistency function's samples keep that much."""
        return self.sigma_min if self.boundary == "sigma_min" else 0.0


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), Karras et al. 2022, eq. 7.

    With `boundary="zero"` the coefficients are those of Karras et al. 2022, table 1, and D is the identity at 0; with
    "sigma_min" those of Song et al. 2023, appendix C, and it is the identity at sigma_min. Both share c_in and c_noise,
    so weights trained under one start the other.

    TrigFlow's boundary is zero. With sigma = sigma_data tan(t), its f = cos(t) x_t - sin(t) sigma_data
    F(x_t / sigma_data, t) of x_t = cos(t) x (Lu & Song 2024, eq. 5) has c_skip = cos^2, c_in = cos / sigma_data and
    c_out = -sin sigma_data: Karras et al.'s, but for the network's sign.
    """

    def __init__(self, config: DenoiserConfig, backbone: nn.Module):
        super().__init__()
        self.config, self.backbone = config, backbone

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise for sigma [B]."""
        data = self.config.sigma_data
        inverse_root = torch.rsqrt(sigma**2 + data**2)
        # The boundary shifts sigma where it must vanish, but not under c_out's root.
        shifted = sigma - self.config.sigma_boundary
        c_skip = 1 / (1 + (shifted / data) ** 2)  # in this form exactly 1 where shifted is 0
        c_out = shifted * data * inverse_root
        return c_skip, c_out, inverse_root, self.c_noise(sigma)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the backbone is told for noise levels sigma [B]."""
        return sigma.log() / 4 if self.config.c_noise == "log_sigma" else torch.atan(sigma / self.config.sigma_data)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The denoised images, float32 [B, C, H, W], not clamped.

        Args:
            x: noisy images [B, C, H, W] in [-1, 1] plus noise.
            sigma: noise level of each image [B], or one for all (0-dim).
            labels: class indices, int64 [B], or None; num_classes is the null label where there is one.
            dropout_keys: int32 [B, 2]; dropout happens only where keys are given, the same keys give the same
                masks, so two passes share theirs and samplers have none.
            augment_labels: [B, augment_dim], how each image was augmented, for a backbone that is told of it;
                samplers have none. A backbone that isn't told needs no such argument.
        """
        sigma = sigma.to(x.dtype).expand(x.shape[0])
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        more = {} if augment_labels is None else {"augment_labels": augment_labels}
        output = self.backbone(per_image(c_in, x) * x, c_noise, labels, dropout_keys, **more)
        return per_image(c_skip, x) * x + per_image(c_out, x) * output.to(x.dtype)


def build_denoiser(config: DenoiserConfig, backbone: BackboneConfig) -> Denoiser:
    """A denoiser with fresh weights on the current default device, convolutions in channels_last."""
    num_labels = config.num_classes + config.null_label
    network = registry.build(backbone, config.image_size, config.image_channels, num_labels)
    return Denoiser(config, network.to(memory_format=torch.channels_last))


def forward_flops(config: DenoiserConfig, backbone: BackboneConfig) -> int:
    """Floating-point operations of one image's way through the network; a multiplication and an addition are two."""
    with torch.device("meta"):
        sketch = build_denoiser(config, backbone)
        x = torch.zeros(1, *config.image_shape)
        labels = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            sketch(x, torch.ones(1), labels)
    return counter.get_total_flops()
