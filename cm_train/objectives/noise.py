"""Which noise levels are trained on: the proposals that draw them and the curricula that size their grid."""

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from ..core import registry
from ..core.errors import InputError
from ..core.registry import ComponentConfig, register
from ..core.settings import Positive, Settings
from ..models.noise_levels import Rho, Sigma, karras_sigmas


class ProposalConfig(ComponentConfig):
    """The `noise.proposal` group."""

    kind: ClassVar = "proposal"


class CurriculumConfig(ComponentConfig):
    """The `noise.curriculum` group."""

    kind: ClassVar = "curriculum"


class Proposal(ABC):
    """Which noise levels are drawn how often.

    Attributes:
        continuous: whether it has levels of its own, beside those of a grid.
    """

    continuous: ClassVar[bool]

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def interval_weights(self, sigmas: Tensor) -> Tensor:
        """Unnormalised probability of each interval of a descending grid [N]; [N - 1]."""

    def sigma(self, u: Tensor) -> Tensor:
        """Levels for uniforms u [B] in [0, 1), of no grid; [B]."""
        raise NotImplementedError


class Curriculum(ABC):
    """How fine the grid of noise levels is as training goes on."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def num_scales(self, step: int, schedule_steps: int) -> int:
        """The number of grid points, at least 2, of `step` in 0, 1, ... of so many that the schedule counts to."""

    @property
    @abstractmethod
    def first_num_intervals(self) -> int:
        """The number of intervals that it begins with, the anchor of the target decay mu(k)."""


@register
class LogNormal(Proposal):
    """ln(sigma) ~ N(mean, std^2): Karras et al. 2022, table 1; on a grid, Song & Dhariwal 2023 (iCT), eq. 10."""

    continuous = True

    class Config(ProposalConfig):
        name: Literal["lognormal"] = "lognormal"
        mean: float = -1.2
        std: Positive = 1.2

    config: Config

    def sigma(self, u: Tensor) -> Tensor:
        """See `Proposal`; by the inverse distribution function."""
        u = u.clamp(1e-15, 1 - 1e-15)
        return torch.exp(self.config.mean + self.config.std * math.sqrt(2) * torch.erfinv(2 * u - 1))

    def interval_weights(self, sigmas: Tensor) -> Tensor:
        cdf = torch.erf((sigmas.log() - self.config.mean) / (math.sqrt(2) * self.config.std))
        return cdf[:-1] - cdf[1:]


@register
class UniformIndex(Proposal):
    """Every interval of the grid alike: Song et al. 2023, algorithms 2 and 3."""

    continuous = False

    class Config(ProposalConfig):
        name: Literal["uniform"] = "uniform"

    config: Config

    def interval_weights(self, sigmas: Tensor) -> Tensor:
        return torch.ones_like(sigmas[1:])


@register
class Constant(Curriculum):
    """The same grid throughout."""

    class Config(CurriculumConfig):
        name: Literal["constant"] = "constant"
        num_scales: Annotated[int, Field(ge=2, le=1_000_000)] = 18

    config: Config

    def num_scales(self, step: int, schedule_steps: int) -> int:
        return self.config.num_scales

    @property
    def first_num_intervals(self) -> int:
        return self.config.num_scales - 1


class _Growing(CurriculumConfig):
    s0: Annotated[int, Field(ge=1)]
    s1: Annotated[int, Field(ge=1, le=1_000_000)]

    def model_post_init(self, _: Any) -> None:
        if self.s1 < self.s0:
            raise ValueError(f"s1 must be at least s0={self.s0}")


@register
class SquareRoot(Curriculum):
    """N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1: Song et al. 2023, appendix C."""

    class Config(_Growing):
        name: Literal["sqrt"] = "sqrt"
        s0: Annotated[int, Field(ge=2)] = 2
        s1: Annotated[int, Field(ge=2, le=1_000_000)] = 150

    config: Config

    def num_scales(self, step: int, schedule_steps: int) -> int:
        s0, s1 = self.config.s0, self.config.s1
        done = min(step, schedule_steps) / schedule_steps
        # The published formula reaches s1 + 1 (= N of s1 intervals) just before the end; beyond it, it would go on.
        return min(math.ceil(math.sqrt(done * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1), s1) + 1

    @property
    def first_num_intervals(self) -> int:
        return self.config.s0


@register
class Doubling(Curriculum):
    """N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = floor(K / (log2 floor(s1/s0) + 1)): iCT, section 3.4."""

    class Config(_Growing):
        name: Literal["doubling"] = "doubling"
        s0: Annotated[int, Field(ge=1)] = 10
        s1: Annotated[int, Field(ge=1, le=1_000_000)] = 1280

    config: Config

    def num_scales(self, step: int, schedule_steps: int) -> int:
        s0, s1 = self.config.s0, self.config.s1
        stage_steps = max(int(schedule_steps / (math.log2(s1 // s0) + 1)), 1)
        # Beyond s1 the power only grows; the cap on it keeps the integer small in runs that go on for long.
        return min(s0 * 2 ** min(step // stage_steps, 64), s1) + 1

    @property
    def first_num_intervals(self) -> int:
        return self.config.s0


class NoiseConfig(Settings):
    """The `noise` group."""

    sigma_min: Sigma = 0.002
    sigma_max: Sigma = 80.0
    rho: Rho = 7.0
    sigma_data: Sigma | None = None  # None: measured on the data set, or inherited from the teacher
    # How the network is told the level: ln(sigma) / 4 or TrigFlow's angle; None: as the teacher is, else log_sigma.
    c_noise: Literal["log_sigma", "angle"] | None = None
    proposal: SerializeAsAny[ProposalConfig]
    curriculum: SerializeAsAny[CurriculumConfig] | None = None  # None where noise levels are continuous

    def model_post_init(self, _: Any) -> None:
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max must exceed sigma_min={self.sigma_min}")


def check_noise(config: NoiseConfig, levels: str) -> None:
    """Refuse a noise config that can't serve an objective of "continuous" or "grid" levels.

    Raises:
        InputError: it can't.
    """
    if levels == "grid" and config.curriculum is None:
        raise InputError(
            "this mode draws levels of a grid", "noise.curriculum=null", "uniform, ct, ict", "noise=uniform"
        )
    if levels == "continuous" and not registry.component(config.proposal).continuous:
        got = f"noise.proposal.name={config.proposal.name}"
        raise InputError("this mode draws continuous noise levels", got, "lognormal", "noise=lognormal")


class NoiseSchedule:
    """Draws noise levels for training; every number is a function of the step and of the uniforms given."""

    def __init__(self, config: NoiseConfig, schedule_steps: int):
        self.config, self.schedule_steps = config, schedule_steps
        self.proposal: Proposal = registry.build(config.proposal)
        self.curriculum: Curriculum | None = None if config.curriculum is None else registry.build(config.curriculum)
        self._table = lru_cache(maxsize=4)(self._make_table)

    def num_scales(self, step: int) -> int:
        """N(step), the number of grid points."""
        assert self.curriculum is not None, "its levels are continuous"
        return self.curriculum.num_scales(step, self.schedule_steps)

    def grid(self, num_scales: int) -> Tensor:
        """The Karras grid of so many points; float64 [num_scales], descending."""
        c = self.config
        return karras_sigmas(num_scales, c.sigma_min, c.sigma_max, c.rho)

    @property
    def first_num_intervals(self) -> int:
        """s0 of the curriculum (the N - 1 of a constant one), the anchor of the target decay mu(k)."""
        assert self.curriculum is not None, "its levels are continuous"
        return self.curriculum.first_num_intervals

    def sigma(self, u: Tensor) -> Tensor:
        """Continuous levels for uniforms u [B]; float32 [B], kept within [sigma_min, sigma_max]."""
        return self.proposal.sigma(u).clamp(self.config.sigma_min, self.config.sigma_max).float()

    def sigma_pair(self, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Neighbouring grid levels (sigma, sigma_next), sigma > sigma_next, for uniforms u [B]; float32 [B] each."""
        sigmas, cdf = self._table(self.num_scales(step), u.device)
        index = torch.searchsorted(cdf, u, right=True).clamp(max=len(cdf) - 1)
        return sigmas[index].float(), sigmas[index + 1].float()

    def _make_table(self, num_scales: int, device: torch.device) -> tuple[Tensor, Tensor]:
        sigmas = self.grid(num_scales)
        weights = self.proposal.interval_weights(sigmas)
        cdf = weights.cumsum(0) / weights.sum()
        if device.type == "cuda":  # from pinned memory the copy does not make the host wait
            sigmas, cdf = sigmas.pin_memory(), cdf.pin_memory()
        return sigmas.to(device, non_blocking=True), cdf.to(device, non_blocking=True)
