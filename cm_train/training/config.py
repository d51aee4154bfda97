"""A run's config, typed."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from ..core import registry
from ..core.errors import InputError
from ..core.precision import Precision
from ..core.registry import MOST, Count, Settings, Text, shown
from ..models.denoiser import SamplingConfig
from ..objectives.noise import NoiseConfig
from .compile_policy import Compile
from .tracking import TrackingConfig


class RunConfig(Settings):
    """Everything that makes a run; the components' own groups stay plain until the registry types them."""

    mode: str
    name: Text
    run_dir: Text
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    steps: Count
    schedule_steps: Count | None = None  # what schedules count to; None: `steps` of the run's first start
    batch_size: Count
    micro_batch: Count | None = None  # None: the whole batch at once
    devices: Count | Literal["auto"] = "auto"  # processes on this machine: auto is one a GPU, one on a CPU
    precision: Precision = "auto"
    compile: Compile = "auto"
    deterministic: bool = False  # equal bits on a GPU too
    teacher: Text | None = None
    init: Text = "random"
    guidance: Annotated[float, Field(ge=0, le=1000)] = 1.0  # of the teacher; 1: none
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # how often training hides the class
    save_every: int | str
    preview_every: Annotated[int, Field(ge=0, le=MOST)]
    log_every: Count
    keep: Count
    max_hours: Annotated[float, Field(gt=0)] | None = None  # of the command, its teacher included
    objective_metric: str | None = None  # what a sweep's table shows and a search looks at
    fail_fast: bool = False  # of a sweep: whether the first job that fails stops the others
    max_skipped: Count = 100  # steps in a row that may be skipped before training counts as broken
    dataset: dict[str, Any]
    backbone: dict[str, Any]
    objective: dict[str, Any]
    noise: NoiseConfig
    ema: dict[str, Any]
    optimizer: dict[str, Any]
    sampling: SamplingConfig
    tracking: TrackingConfig

    def model_post_init(self, _: Any) -> None:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} must divide by micro_batch {self.micro_batch}")
        save_interval(self.save_every)

    @property
    def folder(self) -> Path:
        return Path(os.path.expanduser(self.run_dir))

    @property
    def usual_teacher(self) -> Path:
        """The run that is its teacher where it needs one and names none."""
        return self.folder.parent / f"{self.dataset['name']}-edm"

    @property
    def num_schedule_steps(self) -> int:
        """What every schedule counts to."""
        return self.steps if self.schedule_steps is None else self.schedule_steps

    @property
    def start(self) -> str | None:
        """The run or checkpoint whose weights are the first ones, where `init` names one."""
        return None if self.init in ("random", "teacher") else self.init

    def loss_needs_teacher(self) -> bool:
        cls = registry.find("objective", self.objective.get("name"))
        return cls.needs_teacher(registry.settings("objective", self.objective))

    def gap(self) -> float:
        """See `Objective.gap`."""
        cls = registry.find("objective", self.objective.get("name"))
        return cls.gap(registry.settings("objective", self.objective), self.noise)

    def check_machine(self) -> None:
        """Whether loss and tracking find here what they need from outside this package. Raises InputError."""
        self.tracking.check_machine()
        cls, settings = (
            registry.find("objective", self.objective.get("name")),
            registry.settings("objective", self.objective),
        )
        cls.check_machine(settings)
        if self.deterministic and torch.cuda.is_available() and not cls.is_deterministic(settings):
            what = "this loss has no deterministic gradient on a GPU"
            raise InputError(what, "deterministic=true", "false", "drop deterministic=, or choose another distance")

    def needs_teacher(self) -> bool:
        """Whether there is a teacher: for the loss, or for the first weights only."""
        return self.init == "teacher" or self.loss_needs_teacher()


def save_interval(save_every: int | str) -> tuple[int | None, float | None]:
    """(steps, None) or (None, seconds) from `save_every`: a number of steps, or minutes as "15m".

    Raises:
        ValueError: neither.
    """
    text = shown(save_every).strip()
    number = text.removesuffix("m")
    if number.isdecimal() and 0 < int(number) <= MOST:
        return (None, int(number) * 60.0) if text.endswith("m") else (int(number), None)
    raise ValueError(f"save_every={text!r} is neither steps (1000) nor minutes ('15m')")


def dump(config: RunConfig) -> dict[str, Any]:
    """Plain values that `registry.typed(RunConfig, ...)` reads back."""
    return config.model_dump(mode="python")
