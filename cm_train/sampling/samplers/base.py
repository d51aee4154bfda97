"""What every sampler is, whatever it does between noise and images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from ...core.registry import ComponentConfig
from ...models.denoiser import DenoiserConfig, Kind

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x [B, C, H, W], sigma [B]) -> denoised [B, C, H, W]


class SamplerConfig(ComponentConfig):
    """What a sampler is chosen by: its name."""

    kind: ClassVar = "sampler"


class Sampler(ABC):
    """A way from noise to images. It has no state: whatever is random comes from outside.

    Attributes:
        usual_for: the kind of model that `sampler=auto` takes it for; every kind has one.
        order: its error falls as steps^-order; None where it solves no equation.
        known_as: the sampler whose images these are, where that is another one: to a request, both are the same.
    """

    Config: ClassVar[type[SamplerConfig]]
    usual_for: ClassVar[Kind | None] = None
    order: ClassVar[int | None] = None
    known_as: ClassVar[str | None] = None

    def __init__(self, config: SamplerConfig):
        self.config = config

    @abstractmethod
    def num_calls(self, num_levels: int) -> int:
        """Network calls (NFE) that an image costs at so many noise levels."""

    @abstractmethod
    def levels(self, config: DenoiserConfig, steps: int | None) -> list[float]:
        """The noise levels for a checkpoint where nobody names them, descending.

        Args:
            steps: how many, 1 or more; None leaves that to the sampler.

        Raises:
            InputError: the checkpoint doesn't have so many.
        """

    def check(self, sigmas: Sequence[float]) -> None:  # noqa: B027 - most can sample at any
        """Raise InputError where it can't sample at these noise levels; they descend."""

    @abstractmethod
    def sample(
        self, denoise: Denoise, x: Tensor, sigmas: Sequence[float], boundary: float, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """The images [B, C, H, W], not clamped.

        Args:
            denoise: is called with noisy images and the noise level of each.
            x: unit noise times sigmas[0], [B, C, H, W].
            sigmas: the levels to denoise at, descending, none below `boundary`.
            boundary: the noise level of what `denoise` returns, see `DenoiserConfig.sigma_boundary`.
            noise: fresh unit noise [B, C, H, W] to use ahead of level i >= 1; the same i gives the same.
        """
