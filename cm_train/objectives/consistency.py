"""The consistency loss on neighbouring noise levels: distillation, training, and improved training."""

import math
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core import registry
from ..core.registry import register
from ..models.averages import ema_update, frozen_copy
from ..models.denoiser import Denoiser, per_image
from ..sampling.samplers.base import Denoise
from ..sampling.samplers.euler import euler_step
from ..sampling.samplers.heun import heun_step
from .base import Batch, Objective, ObjectiveConfig
from .distances import DistanceConfig
from .noise import NoiseConfig, NoiseSchedule


class ConsistencyConfig(ObjectiveConfig):
    """The `objective` group for `name: consistency`."""

    name: Literal["consistency"] = "consistency"
    # Where the point at the lower level comes from: the teacher's ODE step (CD) or the same image and noise (CT).
    pair: Literal["teacher", "data"] = "teacher"
    solver: Literal["euler", "heun"] = "heun"  # of the teacher's step
    distance: str = "l2"
    huber_c: Annotated[float, Field(gt=0)] | None = None  # of pseudo_huber; None: 0.00054 sqrt(pixels * channels)
    weighting: Literal["uniform", "inverse_gap"] = "uniform"  # 1, or 1 / (sigma - sigma_next)
    # mu of the target's average. "constant": target_decay at every step. "paper": exp(s0 ln(target_decay) / N(k)).
    # "openai": the same with N - 1, as OpenAI's code and the JAX code compute it. 0 makes the target the student.
    target_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_schedule: Literal["constant", "paper", "openai"] = "constant"

    def model_post_init(self, _: Any) -> None:
        self.distance_config()

    def distance_config(self) -> DistanceConfig:
        """The settings of the distance. Raises InputError for a name that nobody registered."""
        takes_c = "huber_c" in registry.find("distance", self.distance).Config.model_fields
        own = {"huber_c": self.huber_c} if takes_c else {}
        config: DistanceConfig = registry.settings("distance", {"name": self.distance, **own})
        return config

    def needs_teacher(self) -> bool:
        return self.pair == "teacher"

    def without_files(self) -> Self:
        return self.model_copy(update={"distance": "l2", "huber_c": None}) if self.distance == "lpips" else self

    def check_machine(self) -> None:
        self.distance_config().check_machine()

    def is_deterministic(self) -> bool:
        return self.distance_config().is_deterministic

    def relative_gap(self, noise: NoiseConfig) -> float:
        schedule = NoiseSchedule(noise, schedule_steps=2**20)
        sigmas = schedule.grid(schedule.num_scales(2**20))  # the finest, at the schedule's end
        return (1 - sigmas[1:] / sigmas[:-1]).min().item()


@register
class Consistency(Objective):
    """lambda d(f(x, sigma), target(x_next, sigma_next)), Song et al. 2023, algorithm 2 (CD) and 3 (CT).

    iCT (Song & Dhariwal 2023) is `pair=data` with its own proposal, curriculum, distance and weighting.
    """

    Config = ConsistencyConfig
    kind = "consistency"
    boundary = "sigma_min"
    levels = "grid"

    def __init__(self, config: ConsistencyConfig, denoiser: Denoiser, *args: Any, **kwargs: Any):
        super().__init__(config, denoiser, *args, **kwargs)
        assert (self.teacher is not None) == (config.pair == "teacher")
        self.distance = registry.build(config.distance_config())
        if isinstance(self.distance, nn.Module):
            self.distance.to(next(denoiser.parameters()).device)
        self.target: Denoiser | None = None  # None: the student itself
        self.target_weights: Tensor | None = None
        if config.target_decay > 0:
            self.target, self.target_weights = frozen_copy(denoiser)

    def draw_levels(self, u: Tensor, step: int) -> dict[str, Tensor]:
        sigma, sigma_next = self.noise.sigma_pair(u, step)
        return {"sigma": sigma, "sigma_next": sigma_next}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, noise, labels, keys = batch.x0, batch.noise, batch.labels, batch.dropout_keys
        sigma, sigma_next = batch.levels["sigma"], batch.levels["sigma_next"]
        x = x0 + per_image(sigma, x0) * noise
        denoised = self.denoiser(x, sigma, labels, keys)
        with torch.no_grad():
            if self.teacher is None:
                x_next = x0 + per_image(sigma_next, x0) * noise
            else:
                step = heun_step if self.config.solver == "heun" else euler_step
                x_next = step(self._teacher(labels), x, sigma, sigma_next)
            # The same keys: student and target lose the same units (iCT, section 3.2).
            target = self.denoiser if self.target is None else self.target
            goal = target(x_next, sigma_next, labels, keys)
        distance = self.distance(denoised, goal)
        weight = 1.0 if self.config.weighting == "uniform" else 1 / (sigma - sigma_next)
        return weight * distance, {"distance": distance}

    def _teacher(self, labels: Tensor | None) -> Denoise:
        return lambda x, sigma: self.teacher(x, sigma, labels)  # type: ignore[misc]

    def target_decay(self, step: int) -> float:
        """mu of `step`."""
        decay = self.config.target_decay
        if self.config.target_schedule == "constant" or decay == 0:
            return decay
        num = self.noise.num_scales(step) - (self.config.target_schedule == "openai")
        return math.exp(self.noise.first_num_intervals * math.log(decay) / num)

    def after_step(self, step: int, weights: Tensor, applied: Tensor) -> None:
        if self.target_weights is not None:
            ema_update(self.target_weights, weights, self.target_decay(step), applied)

    def schedule(self, step: int) -> dict[str, float]:
        return {"num_scales": self.noise.num_scales(step), "target_decay": self.target_decay(step)}

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.target_weights is None else {"target": self.target_weights}
