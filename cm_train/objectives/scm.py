"""Continuous-time consistency models in TrigFlow: training (sCT) and distillation (sCD)."""

import warnings
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.registry import register
from ..core.settings import Positive
from ..models.backbones.base import autocast_off, blocks_as_written
from ..models.denoiser import Denoiser, per_image
from .base import Batch, Objective, ObjectiveConfig
from .distances import l2
from .weighting import LearnedWeighting


class SCMConfig(ObjectiveConfig):
    """The `objective` group for `name: scm`."""

    name: Literal["scm"] = "scm"
    # dx/dt along the path: the teacher's (sCD), or that of the image and noise themselves (sCT).
    velocity: Literal["teacher", "data"] = "data"
    tangent_warmup_steps: Annotated[int, Field(ge=0)] = 10_000  # H, over which the tangent's unstable part fades in
    tangent: Literal["normalize", "clip"] = "normalize"  # g / (|g| + c), or each pixel of g to [-1, 1]
    tangent_c: Positive = 0.1
    adaptive_weighting: bool = True  # learn e^w(t); false: 1

    def needs_teacher(self) -> bool:
        return self.velocity == "teacher"


@register
class SCM(Objective):
    """Lu & Song 2024 (Simplifying, stabilizing and scaling continuous-time consistency models), algorithm 1.

    Their x_t is cos(t) x for our x = x0 + sigma noise, with sigma = sigma_data tan(t); their network F is minus our
    backbone (see `Denoiser`). A teacher of any conditioning serves: its velocity is asked of its denoised image.
    """

    Config = SCMConfig
    kind = "consistency"
    boundary = "zero"
    levels = "continuous"

    def __init__(self, config: SCMConfig, denoiser: Denoiser, *args: Any, **kwargs: Any):
        super().__init__(config, denoiser, *args, **kwargs)
        assert (self.teacher is not None) == (config.velocity == "teacher")
        self.weighting = LearnedWeighting(denoiser) if config.adaptive_weighting else None
        with warnings.catch_warnings():  # torch's own first use of forward mode warns of a deprecated torch function
            warnings.simplefilter("ignore", FutureWarning)
            torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.zeros(1),))

    def tangent_warmup(self, step: int) -> float:
        """r of `step`, from 0 to 1: the share of the tangent's part that depends on the network's derivative."""
        num = self.config.tangent_warmup_steps
        return min(1.0, step / num) if num else 1.0

    def draw_levels(self, u: Tensor, step: int) -> dict[str, Tensor]:
        sigma = self.noise.sigma(u)
        return {"sigma": sigma, "tangent_warmup": torch.full_like(sigma, self.tangent_warmup(step))}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, noise, sigma, labels = batch.x0, batch.noise, batch.levels["sigma"], batch.labels
        data = self.denoiser.config.sigma_data
        scale = torch.rsqrt(sigma**2 + data**2)
        cos, sin = per_image(data * scale, x0), per_image(sigma * scale, x0)
        x = x0 + per_image(sigma, x0) * noise
        if self.teacher is None:
            velocity = cos * data * noise - sin * x0  # eq. 4
        else:
            with torch.no_grad():
                velocity = (cos * cos * x - self.teacher(x, sigma, labels)) / sin  # eq. 5 for sigma_data F

        def network(scaled: Tensor, sigma: Tensor) -> Tensor:
            c_noise = self.denoiser.c_noise(sigma)
            return -self.denoiser.backbone(scaled, c_noise, labels, batch.dropout_keys).to(scaled.dtype)

        scaled = cos * x / data
        output = network(scaled, sigma)
        with torch.no_grad():
            exact, derivative = _along(network, scaled, cos * sin * velocity / data, sigma)
            g = -(cos**2) * (data * exact - velocity)
            g = g - per_image(batch.levels["tangent_warmup"], x0) * (cos * sin * cos * x + data * derivative)
            goal = output + self._bounded(g)
        error = l2(output, goal)
        # The loss's value says nothing of progress: with the tangent normalised, its size is always that of g.
        loss = error if self.weighting is None else self.weighting.weighted(error, sigma)
        return loss, {"tangent_rms": g.square().flatten(1).mean(1).sqrt()}

    def _bounded(self, g: Tensor) -> Tensor:
        """The tangent [B, C, H, W] normalised over each image, or clipped, which keeps its variance in check."""
        if self.config.tangent == "clip":
            return g.clamp(-1, 1)
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
        return g / per_image(norm + self.config.tangent_c, g)

    def schedule(self, step: int) -> dict[str, float]:
        return {"tangent_warmup": self.tangent_warmup(step)}

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.weighting is None else dict(self.weighting.state_dict())


def _along(network: Any, scaled: Tensor, direction: Tensor, sigma: Tensor) -> Any:
    """F and cos(t) sin(t) dF/dt along the path: an exact Jacobian-vector product, in float32 throughout.

    `direction` is cos(t) sin(t) d(x_t / sigma_data)/dt, to which no further sigma_data belongs. The same factor times
    d(sigma)/dt is sigma_data tan(t), that is, sigma itself: so the second argument is sigma, its tangent too, and the
    network's own conditioning on it is differentiated with the rest.
    """
    # Fused attention has no forward-mode derivative.
    with autocast_off(scaled), blocks_as_written(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(network, (scaled, sigma), (direction, sigma))
