"""The augmentation of Karras et al. 2022 (EDM), appendix F.2: random transforms and the numbers that tell them.

A network that is told the numbers learns more images than there are, and makes unchanged ones where they are zeros.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.rng import Draws

NUM_LABELS = 9
_SPREAD = 0.2  # log2 of how much an image grows, or is stretched, for one standard deviation
_SHIFT = 0.125  # of the side, for one standard deviation
_TURNED = 0.5  # how often a stretch has a direction of its own; else it is along the sides
# The low-pass filter of the wavelet sym6 (Daubechies 1992): images are doubled by it, transformed, and halved by it
# again, which leaves one that is not transformed as it is.
_SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
_EDGE = len(_SYM6) // 4  # pixels beyond each side that the halving sees


@dataclass(frozen=True)
class Augmentation:
    """What happens to each of B images, in this order; zeros are nothing. All float32 [B].

    Attributes:
        flip_x, flip_y: 1 mirrors it left to right, and top to bottom.
        zoom: log2 of its growth, in units of 0.2.
        turn: radians, in (-pi, pi].
        stretch: log2 of its growth in one direction, and of its shrinking across, in units of 0.2.
        direction: of the stretch, radians.
        shift_x, shift_y: in eighths of the side.
    """

    flip_x: Tensor
    flip_y: Tensor
    zoom: Tensor
    turn: Tensor
    stretch: Tensor
    direction: Tensor
    shift_x: Tensor
    shift_y: Tensor

    def labels(self) -> Tensor:
        """What a network is told, [B, 9]: EDM's numbers in EDM's order."""
        turn, along = (self.turn.cos() - 1, self.turn.sin()), (self.direction.cos(), self.direction.sin())
        stretch = self.stretch * along[0], self.stretch * along[1]
        return torch.stack([self.flip_x, self.flip_y, self.zoom, *turn, *stretch, self.shift_x, self.shift_y], dim=1)

    def applied(self, images: Tensor) -> Tensor:
        """The transformed images, [B, C, S, S], S > 1; beyond its edges an image goes on as its mirror image."""
        images = torch.where(_per_image(self.flip_x) == 1, images.flip(3), images)
        images = torch.where(_per_image(self.flip_y) == 1, images.flip(2), images)
        moves = torch.stack([self.zoom, self.turn, self.stretch, self.shift_x, self.shift_y]).ne(0).any(dim=0)
        return torch.where(_per_image(moves), _moved(images, *self._sources(images.shape[-1])), images)

    def _sources(self, side: int) -> tuple[Tensor, Tensor]:
        """Where the new image's point p is taken from: A p + b, from the centre, in pixels; [B, 2, 2] and [B, 2]."""
        zoom, stretch = (-_SPREAD * self.zoom).exp2(), (-_SPREAD * self.stretch).exp2()
        along = torch.diag_embed(torch.stack([stretch, 1 / stretch], dim=1))
        matrix = _rotation(self.turn) @ _rotation(-self.direction) @ along @ _rotation(self.direction)
        matrix = matrix * zoom[:, None, None]
        shift = torch.stack([self.shift_x, self.shift_y], dim=1) * (_SHIFT * side)
        return matrix, -(matrix @ shift[:, :, None])[:, :, 0]


def drawn(draws: Draws, probability: float) -> Augmentation:
    """One for each image of `draws`; each transform happens so often, but for the flip, which half of all have.

    So do EDM's settings say: xflip=1e8, and 1 for five others, times p.
    """
    u = draws.uniform("augment", (10,)).float()
    sizes = draws.normal("augment_sizes", (4,))
    angles = (2 * u[:, 8:] - 1) * math.pi

    def some(gate: int, value: Tensor) -> Tensor:
        return torch.where(u[:, gate] < probability, value, torch.zeros_like(value))

    coins = (u[:, :2] < 0.5).float()
    return Augmentation(
        flip_x=coins[:, 0],
        flip_y=some(2, coins[:, 1]),
        zoom=some(3, sizes[:, 0]),
        turn=some(4, angles[:, 0]),
        stretch=some(5, sizes[:, 1]),
        direction=torch.where(u[:, 7] < _TURNED, some(5, angles[:, 1]), torch.zeros_like(u[:, 7])),
        shift_x=some(6, sizes[:, 2]),
        shift_y=some(6, sizes[:, 3]),
    )


def _moved(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Images [B, C, S, S] sampled at A p + b, at twice their resolution."""
    b, c, _, side = images.shape
    taps = torch.tensor(_SYM6, dtype=images.dtype, device=images.device)
    rows, columns = taps.view(1, 1, -1, 1).expand(c, 1, -1, 1), taps.view(1, 1, 1, -1).expand(c, 1, 1, -1)
    pad = len(_SYM6) // 2 - 1
    mirrored = F.pad(images, [side - 1] * 4, mode="reflect")
    double = F.conv_transpose2d(mirrored, rows, stride=(2, 1), padding=(pad, 0), groups=c)
    double = F.conv_transpose2d(double, columns, stride=(1, 2), padding=(0, pad), groups=c)

    given, wanted = double.shape[-1], 2 * (side + 2 * _EDGE)
    # The doubling moves everything by half a pixel of the doubled image, which the halving takes back.
    half = torch.full_like(offset, 0.5)
    start = 2 * offset + (matrix @ half[:, :, None])[:, :, 0] - half
    to_unit = torch.cat([matrix * (wanted / given), start[:, :, None] * (2 / given)], dim=2)
    points = F.affine_grid(to_unit, [b, c, wanted, wanted], align_corners=False)
    sampled = F.grid_sample(double, points, mode="bilinear", padding_mode="zeros", align_corners=False)

    halved = F.conv2d(sampled, columns, stride=(1, 2), padding=(0, pad), groups=c)
    halved = F.conv2d(halved, rows, stride=(2, 1), padding=(pad, 0), groups=c)
    return halved[:, :, _EDGE:-_EDGE, _EDGE:-_EDGE]


def _rotation(angle: Tensor) -> Tensor:
    """[B] -> [B, 2, 2]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
