"""Everything that a training step moves: weights, optimizer, averages, loss scale and counts; stored and restored."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import registry
from ..core.errors import InputError
from ..core.precision import LossScale
from ..core.terminal import say
from ..core.world import World
from ..models.averages import EMAConfig, ema_update, flatten_gradients, flatten_parameters, frozen_copy, power_decay
from ..models.backbones.base import constrain
from ..models.checkpoints import read as checkpoint
from ..models.checkpoints.manifest import Manifest
from ..models.checkpoints.weights import open_weights
from ..models.denoiser import Denoiser
from ..objectives.base import Objective
from .config import RunConfig
from .meters import Window, norm


@dataclass
class Average:
    """One sampling average: its name in files, its decay at each step, its network and that one's flat weights."""

    name: str
    decay: Callable[[int], float]
    denoiser: Denoiser
    weights: Tensor


class TrainState:
    """What `objective` has learnt after `step` steps, and what it needs to go on as if it had never stopped.

    Args:
        autocast: type of the networks' arithmetic, None for float32.
    """

    def __init__(self, config: RunConfig, objective: Objective, device: torch.device, autocast: torch.dtype | None):
        self.objective, self.device = objective, device
        self.step = 0  # steps done
        # The steps at which power-function averages were kept; None where a checkpoint doesn't know.
        self.snapshots: list[int] | None = []
        self.is_torn = False  # whether a step has moved a part of this and failed before the rest

        # The denoiser's weights come first, so that averages and target follow a slice; whatever else an objective
        # learns comes after them.
        denoiser = objective.denoiser
        trained = list(dict.fromkeys([*denoiser.parameters(), *(p for p in objective.parameters() if p.requires_grad)]))
        learned = flatten_parameters(trained)
        self.weights = learned[: sum(p.numel() for p in denoiser.parameters())]
        self.gradient = flatten_gradients(trained)
        self.optimizer = registry.build(config.optimizer, learned, self.gradient, config.num_schedule_steps)
        constrain(denoiser)  # a run may start from an average, which lies off the surface
        self.averages = [Average(n, decay, *frozen_copy(denoiser)) for n, decay in _decays(config.ema).items()]

        self.loss_scale = LossScale(autocast, device)
        self.skipped = torch.zeros((), device=device)  # steps that were not finite, and how many of them just now
        self.skipped_in_a_row = torch.zeros((), device=device)
        # What the steps since the last log line reported.
        self.window = Window(device, config.noise.sigma_min, config.noise.sigma_max)

    def advance(self) -> None:
        """One optimizer step on the gathered gradient, and all that follows it; nothing in it waits for the device."""
        step, self.is_torn = self.step, True
        grad_norm, applied = self.optimizer.step(step, 1 / self.loss_scale.factor)
        # Averages, target and checkpoints see no weights off their surface.
        constrain(self.objective.denoiser, applied)
        self.objective.after_step(step, self.weights, applied)
        for average in self.averages:
            ema_update(average.weights, self.weights, average.decay(step), applied)
        self.loss_scale.update(applied)
        self.skipped += 1 - applied
        self.skipped_in_a_row.add_(1).mul_(1 - applied)
        self.window.add({"grad_norm": grad_norm, "skipped_share": 1 - applied})
        self.step += 1
        self.is_torn = False

    def measure(self) -> None:
        """Add to the window what costs too much for each step, of the one just made; the gradient's memory is used.

        `update_ratio`: how far the step has moved the weights, relative to their norm; `ema_gap`: how far the weights
        are from the average that samples.
        """
        values = {}
        moved = getattr(self.optimizer, "moved", None)  # a plugin's may not tell
        if moved is not None:
            direction, factor = moved
            values["update_ratio"] = norm(direction) * factor.abs() / norm(self.optimizer.weights)
            self.optimizer.moved = None  # its memory is taken now
        difference = torch.sub(self.weights, self.averages[0].weights, out=self.gradient[: len(self.weights)])
        values["ema_gap"] = norm(difference) / norm(self.weights)
        self.window.add(values)

    def networks(self) -> dict[str, dict[str, Tensor]]:
        """The weights of the denoiser and of each average, by the stem of their file."""
        networks = {"denoiser": self.objective.denoiser} | {a.name: a.denoiser for a in self.averages}
        return {stem: network.state_dict() for stem, network in networks.items()}

    def other_tensors(self) -> dict[str, Any]:
        """Whatever else resuming needs, but for the window, which is summed over the ranks."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.extra_state(),
            "loss_scale": self.loss_scale.state(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load(self, folder: Path, manifest: Manifest, world: World) -> None:
        """Take over a verified checkpoint.

        Raises:
            InputError: it does not fit this run.
        """
        open_weights(folder, manifest, "raw").load_into(self.objective.denoiser)
        for average in self.averages:
            open_weights(folder, manifest, average.name).load_into(average.denoiser)
        stored = checkpoint.read_state(folder)
        try:
            self._load_other(stored, world)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{folder}/state.pt does not fit this run: {error}") from None
        self.step, self.snapshots = manifest.step, manifest.snapshots
        if manifest.threads not in (None, torch.get_num_threads()) and world.is_main and self.device.type == "cpu":
            now = torch.get_num_threads()
            say(f"note: saved with {manifest.threads} threads a process, and now there are {now}: rounding differs")

    def _load_other(self, stored: dict[str, Any], world: World) -> None:
        own = self.other_tensors()
        for group in ("optimizer", "objective"):
            for name, tensor in own[group].items():
                _fill(tensor, stored[group][name], f"{group} {name}")
        for name in ("skipped", "skipped_in_a_row"):
            _fill(own[name], stored[name], name)
        self.loss_scale.load(stored["loss_scale"])
        self.window.load(stored["window"], world)


def _decays(ema: EMAConfig) -> dict[str, Callable[[int], float]]:
    """The decay at each step of every average of the `ema` group, by name; the one that `weights=ema` means first."""
    schedule = registry.build(ema)
    decays: dict[str, Callable[[int], float]] = {f"ema_{d}": partial(schedule.at, d) for d in ema.decays}
    return decays | {f"power_{width}": partial(power_decay, width) for width in ema.power}


def _fill(tensor: Tensor, stored: object, name: str) -> None:
    """Copy without broadcasting, which would hide a foreign state. Raises TypeError or RuntimeError."""
    if not isinstance(stored, Tensor) or stored.shape != tensor.shape or stored.dtype != tensor.dtype:
        got = f"{stored.dtype} {list(stored.shape)}" if isinstance(stored, Tensor) else type(stored).__name__
        raise TypeError(f"{name}, got {got}, allowed: {tensor.dtype} {list(tensor.shape)}")
    tensor.copy_(stored)
