"""A run's networks and loss without their memory: what a training step takes, before anything is made."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..core import registry
from ..models.averages import flat_size
from ..models.backbones.base import BackboneConfig, recompute_blocks
from ..models.denoiser import DenoiserConfig, build_denoiser
from ..objectives.base import Batch, Objective
from ..objectives.noise import NoiseSchedule
from .config import RunConfig

_FLOAT = 4  # bytes
_IMAGES = 2
ACTIVATIONS = 1.3  # times what is saved: gradients on their way back, and what an operator needs for a moment


@dataclass(frozen=True)
class Sketch:
    """What a run's training step takes.

    Attributes:
        num_parameters: of the student.
        num_trained: with whatever else the loss learns.
        num_frozen: of target and teacher.
        num_averages: of weights that are kept for sampling.
        saved_bytes: that the backward pass of one image waits for, in float32.
        flops: of one image's forward and backward passes, the teacher's and target's included.
        forward_flops: of one image's way through the student.
    """

    num_parameters: int
    num_trained: int
    num_frozen: int
    num_averages: int
    saved_bytes: int
    flops: int
    forward_flops: int

    def parts(self, micro_batch: int, factor: float = 1.0) -> dict[str, int]:
        """Bytes by what holds them while a step is made on so many images at once.

        Args:
            factor: of activations, relative to float32.
        """
        weights = _FLOAT * self.num_parameters
        return {
            "weights": _FLOAT * self.num_trained,
            "gradient": _FLOAT * self.num_trained,
            "optimizer": 2 * _FLOAT * self.num_trained,
            "averages": self.num_averages * weights,
            "target and teacher": _FLOAT * self.num_frozen,
            "activations": round(ACTIVATIONS * factor * self.saved_bytes * micro_batch),
        }


def state_bytes(config: RunConfig, objective: Objective) -> int:
    """What a run holds all the time beside the networks that `objective` has: gradients, moments, averages."""
    trained = flat_size(p for p in objective.parameters() if p.requires_grad)
    averages = num_averages(config) * flat_size(objective.denoiser.parameters())
    return _FLOAT * (3 * trained + averages)


def num_averages(config: RunConfig) -> int:
    """How many averages of the weights a run keeps."""
    return len(config.ema.decays) + len(config.ema.power)


def sketch(config: RunConfig, student: DenoiserConfig, teacher: tuple[DenoiserConfig, BackboneConfig] | None) -> Sketch:
    """Of the run of `config`, whose networks are these; a distance's own network, as LPIPS', is left out.

    Args:
        teacher: of the loss, or of the first weights alone; None where there is none.
    """
    with torch.device("meta"):
        denoiser = build_denoiser(student, config.backbone)
        if config.activation_checkpointing:
            recompute_blocks(denoiser)
        guide = None
        if teacher is not None and config.objective.needs_teacher():
            guide = build_denoiser(*teacher).requires_grad_(False).eval()
        noise = NoiseSchedule(config.noise, config.num_schedule_steps)
        objective: Objective = registry.build(
            config.objective.without_files(), denoiser, noise, config.seed, False, guide
        )
        count, flops = _step(objective, student)
    num = flat_size(denoiser.parameters())
    others = [p for p in objective.parameters() if not p.requires_grad]
    with torch.device("meta"), FlopCounterMode(display=False) as forward, torch.no_grad():
        denoiser(torch.zeros(1, *student.image_shape), torch.ones(1), _labels(student, 1))
    return Sketch(
        num_parameters=num,
        num_trained=flat_size(p for p in objective.parameters() if p.requires_grad),
        num_frozen=flat_size(others),
        num_averages=num_averages(config),
        saved_bytes=count // _IMAGES,
        flops=flops // _IMAGES,
        forward_flops=forward.get_total_flops(),
    )


def _step(objective: Objective, student: DenoiserConfig) -> tuple[int, int]:
    """Bytes saved for the backward pass of some images, and the operations of their whole step."""
    seen: dict[int, Tensor] = {}
    own = {p.untyped_storage()._cdata for p in objective.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            seen[x.untyped_storage()._cdata] = x
        return x

    hooks: AbstractContextManager[Any] = saved_tensors_hooks(pack, lambda x: x)
    with torch.device("cpu"):  # of which there are numbers
        levels = objective.draw_levels(torch.zeros(_IMAGES, dtype=torch.float64), 0)
    with FlopCounterMode(display=False) as counter:
        images = torch.zeros(_IMAGES, *student.image_shape)
        batch = Batch(
            x0=images,
            noise=images,
            labels=_labels(student, _IMAGES),
            dropout_keys=torch.zeros(_IMAGES, 2, dtype=torch.int32),
            levels={name: level.to("meta") for name, level in levels.items()},
        )
        with hooks:
            loss, _ = objective(batch)
        loss.sum().backward()
    return sum(x.untyped_storage().nbytes() for x in seen.values()), counter.get_total_flops()


def _labels(student: DenoiserConfig, num: int) -> Tensor | None:
    return torch.zeros(num, dtype=torch.int64) if student.num_classes else None
