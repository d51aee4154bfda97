"""EfficientNet-Lite0, a small classifier of photographs: Tan & Le 2019 (arXiv:1905.11946), its variant for phones.

Against EfficientNet-B0 it has no squeeze-and-excitation and ReLU6 for swish.
"""

import torch.nn.functional as F
from torch import Tensor, nn

_STEM, _HEAD, _CLASSES = 32, 1280, 1000
# For each stage: factor of its widening, channels, blocks, stride of the first, side of the filter.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_EPS = 1e-3  # of the batch norms, as TensorFlow has it


class _SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME" does: the odd row goes to the end."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, side, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        side, stride = self.kernel_size[0], self.stride[0]
        padding: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            needed = max((-(-size // stride) - 1) * stride + side - size, 0)
            padding += [needed // 2, needed - needed // 2]
        return super().forward(F.pad(x, padding) if any(padding) else x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPS)


class _Block(nn.Module):
    """Widen, filter each channel by itself, narrow; added to what came in where it has that shape."""

    def __init__(self, inputs: int, outputs: int, factor: int, stride: int, side: int):
        super().__init__()
        wide = inputs * factor
        widened = [] if factor == 1 else [_SameConv(inputs, wide, 1), _norm(wide), nn.ReLU6()]
        self.body = nn.Sequential(
            *widened,
            _SameConv(wide, wide, side, stride, groups=wide),
            _norm(wide),
            nn.ReLU6(),
            _SameConv(wide, outputs, 1),
            _norm(outputs),
        )
        self.is_added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.is_added else y


class EfficientNetLite0(nn.Module):
    """4,652,008 parameters. Takes normalised images [B, 3, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_SameConv(3, _STEM, 3, 2), _norm(_STEM), nn.ReLU6())
        blocks, inputs = [], _STEM
        for factor, outputs, count, stride, side in _STAGES:
            for i in range(count):
                blocks.append(_Block(inputs, outputs, factor, stride if i == 0 else 1, side))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(_SameConv(inputs, _HEAD, 1), _norm(_HEAD), nn.ReLU6())
        self.classes = nn.Linear(_HEAD, _CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 1280], averaged over the image, and logits [B, 1000] of ImageNet's classes."""
        features = self.head(self.blocks(self.stem(x))).mean((2, 3))
        return features, self.classes(features)

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Take published weights, whose tensors come in the order of this network's and have other names.

        Raises:
            ValueError: they are another network's.
        """
        ours = self.state_dict()
        if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in ours.values()]:
            raise ValueError("the weights are not EfficientNet-Lite0's")
        self.load_state_dict(dict(zip(ours, state.values(), strict=True)))
