"""What a run, and a teacher that would be trained before it, would be and cost."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..core import registry
from ..core.terminal import duration
from ..models.denoiser import DenoiserConfig
from ..objectives.noise import NoiseSchedule
from ..training.budget import Budget
from ..training.config import RunConfig
from ..training.sketch import Sketch, sketch
from .budget import Settled, parts_of, within
from .config import Composed
from .inheritance import inherit_backbone
from .machine import Machine
from .measuring import Measured
from .speed import flops_per_second
from .teachers import is_ready

_FLOAT = 4  # bytes
MARGIN = 9  # columns of the words that rows begin with


@dataclass(frozen=True)
class Forecast:
    """What one run would be and cost.

    Attributes:
        seconds: from start to end.
        measured: by what those were reckoned; None where by FLOPs alone.
        num_images: of its data set; None where that is not there.
    """

    config: RunConfig
    sketch: Sketch
    seconds: float
    measured: Measured | None
    num_images: int | None

    @property
    def images(self) -> int:
        """That it trains on."""
        return self.config.steps * self.config.batch_size

    @property
    def epochs(self) -> float | None:
        """How often each image comes; None where nobody knows how many there are."""
        return None if self.num_images is None else self.images / self.num_images

    def memory(self) -> dict[str, int]:
        """Bytes by what holds them."""
        at_once = self.config.batch_size if self.measured is None else self.measured.micro_batch
        return self.sketch.parts(at_once)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint on the disk: weights, averages, the optimizer's two moments."""
        return _FLOAT * (self.sketch.num_parameters * (1 + self.sketch.num_averages) + 2 * self.sketch.num_trained)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; times in seconds, memory in bytes."""
        c, s = self.config, self.sketch
        return {
            "run": str(c.folder),
            "mode": c.mode,
            "network": c.backbone.name,
            "parameters": s.num_parameters,
            "flops": {"call": s.forward_flops, "step": s.flops * c.batch_size},
            "steps": c.steps,
            "batch_size": c.batch_size,
            "images": self.images,
            "epochs": self.epochs,
            "stages": _stages(c),
            "previews": c.num_previews(),
            "checkpoint_bytes": self.checkpoint_bytes,
            "memory": self.memory(),
            "measured": None if self.measured is None else dataclasses.asdict(self.measured),
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """For a person."""
        c, s, stages = self.config, self.sketch, _stages(self.config)
        epochs = "" if self.epochs is None else f", {self.epochs:,.1f} epochs"
        rows = [
            ("run", f"{c.mode} in {c.folder}" + (f", from teacher {c.teacher}" if c.teacher else "")),
            (
                "network",
                f"{c.backbone.name}, {s.num_parameters:,} parameters, {s.forward_flops / 1e9:.3g} GFLOP a call",
            ),
            ("length", f"{c.steps:,} steps of {c.batch_size}, {self.images:,} images{epochs}"),
        ]
        if len(stages) > 1:
            rows.append(("", f"noise levels {stages[0]:,} to {stages[-1]:,} in {len(stages)} stages"))
        rows += zip(("memory", ""), self._memory_lines(), strict=False)
        num_kept = "the two newest and the best" if c.keep == "best" else c.keep
        kept = f"{_size(self.checkpoint_bytes)} a checkpoint, {num_kept} are kept; {c.num_previews()} previews"
        rows += [("on disk", kept), ("time", self._time())]
        return [f"{name:<{MARGIN}}{text}" for name, text in rows]

    def _memory_lines(self) -> list[str]:
        held = ", ".join(f"{name} {_size(size)}" for name, size in self.memory().items() if size)
        if self.measured is None:
            return [f"{held} (estimated, the whole batch at once)"]
        m = self.measured
        whole = (
            f"{_size(m.peak_bytes)} a process in all, {_size(m.free_bytes)} are free; {m.micro_batch} images at once"
        )
        return [whole, held]

    def _time(self) -> str:
        m = self.measured
        if m is None:
            many = " or ".join(f"{_long(self.seconds / n)} on {n}" for n in (1, 8))
            return f"estimated from its FLOPs: {many} of this machine's devices"
        return f"{duration(self.seconds)} on {m.ranks} process{'es' * (m.ranks > 1)}, {m.step_s:.3g} s a step, measured"


def forecasts(
    composed: Composed,
    machine: Machine,
    swept: frozenset[str],
    found: dict[str, Any] | None = None,
    classes: int = 0,
) -> list[Forecast] | None:
    """Of the teacher, where that would be trained first, and of the run; None where measuring was stopped.

    Args:
        swept: the keys that the jobs of a sweep set differently.
        found: see `description.describe`; None where the images were not looked at.
        classes: how many labels there are.
    """
    config = composed.config
    is_published, home = composed.experiment is not None, config.usual_teacher
    wants = config.needs_teacher() and config.teacher is None
    comes_first = wants and not is_ready(home)
    own, part = parts_of(config, comes_first or composed.is_sweep)

    def student(images: int | None, like: RunConfig | None = None) -> RunConfig:
        run = config if is_published else composed.settled(images=images, like=like).config
        run = run.model_copy(update={"teacher": str(home) if wants and not comes_first else run.teacher})
        return inherit_backbone(run, run.teacher if run.start is None else run.start, composed.asked)

    todo: list[tuple[Settled, Budget | None]] = [(student, own)]
    if comes_first:
        todo.insert(0, (lambda images, like=None: composed.teacher(home, swept, images, like), part))
    runs = []
    for settled, budget in todo:
        run = (_estimated if is_published else _measured)(settled, budget, machine, classes, found)
        if run is None:
            return None
        runs.append(run)
    return runs


def _measured(
    settled: Settled,
    budget: Budget | None,
    machine: Machine,
    classes: int,
    found: dict[str, Any] | None,
) -> Forecast | None:
    tried = settled(None if budget is None or budget.unit == "s" else round(budget.amount))
    if budget is not None and budget.unit == "s":
        in_time = within(budget, tried, settled, machine, lambda: 0.0)
        if in_time is None:
            return None
        config, measured = in_time
    else:
        took = machine.measure(tried)
        if took is None:
            return None
        config, measured = tried, took
    num = None if found is None else found["images"]
    return Forecast(config, _sketch(config, classes, found), measured.seconds(config), measured, num)


def _estimated(
    settled: Settled,
    budget: Budget | None,
    machine: Machine,
    classes: int,
    found: dict[str, Any] | None,
) -> Forecast:
    config = settled(None)
    drawn = _sketch(config, classes, found)
    seconds = config.steps * config.batch_size * drawn.flops / flops_per_second()
    return Forecast(config, drawn, seconds, None, None if found is None else found["images"])


def _sketch(config: RunConfig, classes: int, found: dict[str, Any] | None) -> Sketch:
    facts = config.dataset.known_facts()
    size = found["image_size"] if found else facts.image_size if facts else getattr(config.dataset, "image_size", 32)
    channels = found["channels"] if found else facts.channels if facts else getattr(config.dataset, "channels", 3)
    objective = registry.component(config.objective)
    shape = {"image_size": size, "image_channels": channels, "num_classes": classes, "sigma_data": 0.5}
    levels = {"sigma_min": config.noise.sigma_min, "sigma_max": config.noise.sigma_max}
    student = DenoiserConfig(kind=objective.kind, boundary=objective.boundary, **shape, **levels)
    teacher = DenoiserConfig(kind="diffusion", boundary="zero", **shape, **levels)
    return sketch(config, student, (teacher, config.backbone) if config.needs_teacher() else None)


def _stages(config: RunConfig) -> list[int]:
    """The numbers of noise levels that the curriculum goes through; empty where they are continuous."""
    if config.noise.curriculum is None:
        return []
    noise, steps = NoiseSchedule(config.noise, config.num_schedule_steps), config.num_schedule_steps
    looked = sorted({i * steps // 1000 for i in range(1000)} | {max(0, steps - 1)})
    return list(dict.fromkeys(noise.num_scales(step) for step in looked))


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _long(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"
