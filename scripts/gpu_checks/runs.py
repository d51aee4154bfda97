"""Small runs for the checks: all from one network whose weights are perturbed.

A fresh network ends in zeros, so that whatever is compared behind it agrees: comparisons on it prove nothing.
"""

import dataclasses
from pathlib import Path
from typing import Any

import bench
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cm_train.core import configs
from cm_train.core.world import ALONE, World
from cm_train.models.denoiser import DenoiserConfig, build_denoiser
from cm_train.objectives.base import Batch
from cm_train.runs import build
from cm_train.runs.config import parse
from cm_train.training.config import RunConfig
from cm_train.training.trainer import Trainer

MODES = ("cd", "ict", "edm", "ct", "ect", "sct", "scd")
_TAUGHT = ("cd", "scd")
CPU = torch.device("cpu")


class OnCpu(World):
    """A process alone that leaves the GPU alone."""

    @property
    def device(self) -> torch.device:
        return CPU


class Runs:
    """Trainers on digits in `home`, each from the same perturbed weights.

    Args:
        options: for all of them.
    """

    def __init__(self, home: Path, *options: str):
        self.home, self._options, self._count = home, options, 0
        self.start = self._perturbed()

    def config(self, mode: str, *options: str, name: str | None = None) -> RunConfig:
        """Of a run in a folder of its own, or in `name`."""
        self._count += 1
        folder = self.home / (name or f"{mode}-{self._count}")
        start = [f"teacher={self.start}"] if mode in _TAUGHT else []
        start += [f"init={self.start}", "tracking=none", "preview_every=0", "log_every=1000", "save_every=1000"]
        return composed(f"mode={mode}", f"run_dir={folder}", "batch_size=32", *start, *self._options, *options)

    def trainer(self, config: RunConfig, on_gpu: bool = True, **kwargs: Any) -> Trainer:
        """Ready for its next step, compiled where its config says so."""
        config.folder.mkdir(exist_ok=True)
        trainer = build.build_trainer(config, world=ALONE if on_gpu else OnCpu(), **kwargs)
        trainer.prepare()
        return trainer

    def _perturbed(self) -> Path:
        config = composed("mode=edm", "run_dir=unused", *self._options)
        generator = torch.Generator().manual_seed(0)
        levels = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
        known = DenoiserConfig(kind="diffusion", boundary="zero", image_size=8, image_channels=1, **levels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            denoiser = build_denoiser(known, config.backbone)
        with torch.no_grad():
            for p in denoiser.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * (0.5 / max(1, p[0].numel()) ** 0.5))
        return bench.store(self.home / "start", denoiser, config.backbone)


def composed(*overrides: str) -> RunConfig:
    """The config that `cm-train` makes of `overrides`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs.conf_dir()), version_base=None):
        config = parse(compose("train", overrides=[*overrides]))
    return config.model_copy(update={"schedule_steps": config.num_schedule_steps})


def draw_alike(trainer: Trainer, other: Trainer) -> None:
    """Have `trainer` draw what `other` does: one key gives other numbers on another kind of device."""
    draw = other.objective.draw

    def moved(x0: torch.Tensor, labels: torch.Tensor | None, step: int, rows: range) -> Batch:
        batch = draw(x0.to(other.device), None if labels is None else labels.to(other.device), step, rows)
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        here = {name: value.to(trainer.device) for name, value in tensors.items()}
        return dataclasses.replace(batch, **here, levels={k: v.to(trainer.device) for k, v in batch.levels.items()})

    trainer.objective.draw = moved  # type: ignore[method-assign]


def losses(trainer: Trainer, steps: int) -> list[float]:
    """The loss of each of the next steps."""
    found = []
    for _ in range(steps):
        trainer.train_step(trainer.fetch())
        found.append(trainer.state.window.close(ALONE)["loss"])
    return [float("nan") if loss is None else loss for loss in found]
