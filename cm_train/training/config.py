"""A run's config, typed."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializeAsAny

from ..core import registry
from ..core.errors import InputError
from ..core.precision import Precision
from ..core.settings import MAX_EXACT, MAY_CHANGE, Count, Positive, Settings, Text, excerpt
from ..data.datasets.base import DatasetConfig
from ..evaluation.features.base import FeaturesConfig
from ..evaluation.metrics.base import MetricConfig
from ..models.averages import EMAConfig
from ..models.backbones.base import BackboneConfig
from ..models.denoiser import SamplingConfig
from ..objectives.base import ObjectiveConfig
from ..objectives.noise import NoiseConfig
from .budget import Budget
from .compile_policy import Compile
from .optimizers import OptimizerConfig
from .tracking import TrackingConfig

PREFIX = "eval_"  # of the names that numbers of images have in metrics.jsonl


class RunConfig(Settings):
    """Everything that makes a run."""

    mode: str
    data_name: Annotated[Text | None, MAY_CHANGE] = None  # what runs on these images are called after; None: the set's
    name: Annotated[Text, MAY_CHANGE]
    run_dir: Annotated[Text, MAY_CHANGE]
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    steps: Annotated[Count, MAY_CHANGE]
    budget: Annotated[Text | None, MAY_CHANGE] = None  # the time or the images that `steps` were settled by
    teacher_budget: Annotated[Text, MAY_CHANGE] = "auto"  # the teacher's share of it; auto: half
    schedule_steps: Count | None = None  # what schedules count to; None: `steps` of the run's first start
    batch_size: Count
    # images at once on a device; auto: as many as fit, settled before the first step; None: the whole batch
    micro_batch: Annotated[Count | Literal["auto"] | None, MAY_CHANGE] = "auto"
    # processes on this machine: auto is one a GPU, one on a CPU
    devices: Annotated[Count | Literal["auto"], MAY_CHANGE] = "auto"
    precision: Annotated[Precision, MAY_CHANGE] = "auto"
    compile: Annotated[Compile, MAY_CHANGE] = "auto"
    # the backward pass computes each block again: less memory, more time, the same numbers
    activation_checkpointing: Annotated[bool, MAY_CHANGE] = False
    deterministic: Annotated[bool, MAY_CHANGE] = False  # equal bits on a GPU too
    teacher: Annotated[Text | None, MAY_CHANGE] = None  # where it is; which one it must be, the checkpoints know
    # the recipe of the usual one, where that is published
    teacher_experiment: Annotated[Text | None, MAY_CHANGE] = None
    init: Text = "random"
    guidance: Annotated[float, Field(ge=0, le=1000)] = 1.0  # of the teacher; 1: none
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # how often training hides the class
    save_every: Annotated[int | str, MAY_CHANGE]
    preview_every: Annotated[int, Field(ge=0, le=MAX_EXACT), MAY_CHANGE]
    log_every: Annotated[Count, MAY_CHANGE]
    keep: Annotated[Count | Literal["best"], MAY_CHANGE]  # newest checkpoints; best: the newest, and the best by eval_*
    eval_every: Annotated[int, Field(ge=0, le=MAX_EXACT), MAY_CHANGE] = 0  # steps between numbers of images; 0: none
    eval_num: Annotated[int, Field(ge=2, le=MAX_EXACT), MAY_CHANGE] = 512  # images they are of
    metrics: Annotated[dict[str, SerializeAsAny[MetricConfig]], MAY_CHANGE] = {}
    features: Annotated[SerializeAsAny[FeaturesConfig] | None, MAY_CHANGE] = None
    plugins: Annotated[list[Text], MAY_CHANGE] = []  # packages whose components may be used; see `core.plugins`
    max_hours: Annotated[Positive | None, MAY_CHANGE] = None  # of the command, its teacher included
    objective_metric: Annotated[str | None, MAY_CHANGE] = None  # what a sweep's table shows and a search looks at
    notice: Annotated[Text | None, MAY_CHANGE] = None  # what a person should hear at the start
    plan: Annotated[bool, MAY_CHANGE] = False  # say what the run would be and cost, and train nothing
    out: Annotated[Text | None, MAY_CHANGE] = None  # of plan: a folder for plan.json
    fail_fast: Annotated[bool, MAY_CHANGE] = False  # of a sweep: whether the first job that fails stops the others
    max_skipped: Annotated[Count, MAY_CHANGE] = (
        100  # steps in a row that may be skipped before training counts as broken
    )
    dataset: SerializeAsAny[DatasetConfig]
    backbone: SerializeAsAny[BackboneConfig]
    objective: SerializeAsAny[ObjectiveConfig]
    noise: NoiseConfig
    ema: SerializeAsAny[EMAConfig]
    optimizer: SerializeAsAny[OptimizerConfig]
    sampling: SamplingConfig
    tracking: Annotated[TrackingConfig, MAY_CHANGE]

    def model_post_init(self, _: object) -> None:
        if isinstance(self.micro_batch, int) and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} must divide by micro_batch {self.micro_batch}")
        save_interval(self.save_every)
        if self.keep == "best" and not self.eval_every:
            raise ValueError("keep=best needs numbers to go by; fix: eval_every=... steps")
        if self.eval_every and (not self.metrics or self.features is None):
            raise ValueError("eval_every needs metrics and features")
        if self.out is not None and not self.plan:
            raise ValueError("out is where plan=true writes plan.json; fix: run_dir=... says where a run lies")
        budgets = self.budgets()
        if budgets is None and self.teacher_budget != "auto":
            raise ValueError("teacher_budget is a share of budget, which is not set")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(os.path.expanduser(self.run_dir))

    @property
    def usual_teacher(self) -> Path:
        """The run that is its teacher where it needs one and names none."""
        if self.teacher_experiment is not None:
            return self.folder.parent / f"{self.teacher_experiment}-paper"
        return self.folder.parent / f"{self.data_name or self.dataset.run_name}-edm"

    def budgets(self) -> tuple[Budget, Budget] | None:
        """What a run that trains its teacher first may take, and the teacher's part of that; None without a limit.

        Raises:
            InputError: one of them is no time and no number of images, or the part is no part.
        """
        if self.budget is None:
            return None
        whole = Budget.parse("budget", self.budget)
        if self.teacher_budget == "auto":
            return whole, Budget(whole.amount / 2, whole.unit)
        part = Budget.parse("teacher_budget", self.teacher_budget)
        if part.unit != whole.unit or part.amount >= whole.amount:
            allowed = f"less than budget={self.budget}, in its units"
            raise InputError("teacher_budget is the teacher's part of budget", self.teacher_budget, allowed)
        return whole, part

    @property
    def num_schedule_steps(self) -> int:
        """What every schedule counts to."""
        return self.steps if self.schedule_steps is None else self.schedule_steps

    @property
    def start(self) -> str | None:
        """The run or checkpoint whose weights are the first ones, where `init` names one."""
        return None if self.init in ("random", "teacher") else self.init

    def draws_at(self, step: int) -> bool:
        """Whether a preview is due after `step` steps: after the first hundredth, then evenly, and at the end."""
        if self.preview_every == 0:
            return False
        first = self.num_schedule_steps // 100
        return step in (first, self.steps) or step % self.preview_every == 0

    def num_previews(self, after: int = 0) -> int:
        """How many previews are due after so many steps."""
        if self.preview_every == 0 or after >= self.steps:
            return 0
        evenly = self.steps // self.preview_every - after // self.preview_every
        first = self.num_schedule_steps // 100
        others = {step for step in (first, self.steps) if after < step <= self.steps and step % self.preview_every}
        return evenly + len(others)

    def needs_teacher(self) -> bool:
        """Whether there is a teacher: for the loss, or for the first weights only."""
        return self.init == "teacher" or self.objective.needs_teacher()

    @property
    def relative_gap(self) -> float:
        """See `ObjectiveConfig.relative_gap`."""
        return self.objective.relative_gap(self.noise)

    @property
    def sends_pictures(self) -> bool:
        """Whether the tracker gets previews."""
        return self.tracking.sends_pictures(self.dataset.is_published)

    def check_machine(self) -> None:
        """Whether loss and tracking find here what they need from outside this package. Raises InputError."""
        self.tracking.check_machine()
        self.objective.check_machine()
        if self.deterministic and torch.cuda.is_available() and not self.objective.is_deterministic():
            what = "this loss has no deterministic gradient on a GPU"
            raise InputError(what, "deterministic=true", "false", "drop deterministic=, or choose another distance")


def save_interval(save_every: int | str) -> tuple[int | None, float | None]:
    """(steps, None) or (None, seconds) from `save_every`: a number of steps, or minutes as "15m".

    Raises:
        ValueError: neither.
    """
    text = excerpt(save_every).strip()
    number = text.removesuffix("m")
    if number.isdecimal() and 0 < int(number) <= MAX_EXACT:
        return (None, int(number) * 60.0) if text.endswith("m") else (int(number), None)
    raise ValueError(f"save_every={text!r} is neither steps (1000) nor minutes ('15m')")


def dump(config: RunConfig) -> dict[str, Any]:
    """Plain values that `typed(RunConfig, ...)` reads back."""
    return config.model_dump(mode="python")


def may_change() -> frozenset[str]:
    """The keys that the command which resumes a run may set to other values, as "steps" or "dataset.root"."""
    return frozenset(RunConfig.marked(MAY_CHANGE) | registry.marked(MAY_CHANGE))
