"""Numbers of a run's images as it trains: those of cm-eval, by the same code; and which step is the best by them."""

import time
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..core import registry
from ..core.errors import InputError
from ..core.run_layout import METRICS
from ..core.terminal import say
from ..core.world import World
from ..data.datasets.base import Dataset
from ..evaluation import measure
from ..evaluation.comparison import Comparison, compare_with
from ..evaluation.seen import look
from ..evaluation.sources import loaded, with_classes
from ..models.denoiser import Denoiser
from .config import RunConfig
from .drawing import draw_together
from .tracking.metrics_file import values_of

PREFIX = "eval_"  # of their names in metrics.jsonl


class Best(NamedTuple):
    """The best number so far, and the step that has it."""

    step: int
    value: float


class Evaluations:
    """What `eval_every` asks for; every rank calls its methods alike.

    Args:
        dataset: what is trained on, which the images are compared with.
        batch_size: images at once on a rank.

    Attributes:
        took_s: what the last one took.
        is_best: whether the last one was the best of the run, by the number that `keep=best` goes by.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, batch_size: int, world: World):
        self._config, self._dataset, self._batch_size, self._world = config, dataset, batch_size, world
        self._comparison: Comparison | None = None
        self._best: Best | None = None
        self.took_s, self.is_best = 0.0, False

    def is_due(self, step: int) -> bool:
        """Whether there are numbers after `step` steps."""
        every = self._config.eval_every
        return every > 0 and (step % every == 0 or step == self._config.steps)

    def num_left(self, step: int) -> int:
        """How often there are numbers after that."""
        every, steps = self._config.eval_every, self._config.steps
        return -(-steps // every) - step // every if every > 0 and step < steps else 0

    def prepare(self) -> None:
        """Look at the real images, before the first step: whatever is missing for that is better known then.

        Raises:
            InputError: the features can't be had, or no metric can be measured.
            Stopped: see `signals.heed`.
        """
        if self._config.eval_every > 0:
            self._world.run_on_main(self._compare)

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint that `keep=best` spares; rank 0 knows it."""
        return None if self._best is None else self._best.step

    def make(self, denoiser: Denoiser, step: int) -> dict[str, float]:
        """Numbers of the images of the seeds from 0 on, by name; none where memory ran out."""
        began = time.monotonic()
        fix = "micro_batch=..., or eval_every=0"
        images = draw_together(denoiser, self._config.eval_num, self._batch_size, self._world, "evaluation", fix)
        numbers: dict[str, float] = {}
        self.is_best = False
        if images is not None:
            numbers, self.is_best = self._world.run_on_main(lambda: self._measured(images, step))
        self.took_s = time.monotonic() - began
        return numbers

    def _compare(self) -> None:
        config, dataset = self._config, self._dataset
        if config.dataset.is_published and not dataset.num_classes:  # labels are for features that learn them
            dataset = loaded(with_classes(config.dataset))
        assert config.features is not None, "settled with the run's config"
        held_out = config.dataset.held_out()
        self._comparison = compare_with(
            dataset,
            "the training images",
            config.features,
            [*config.metrics.values()],
            (dataset.channels, dataset.image_size, dataset.image_size),
            None if held_out is None else loaded(held_out),
            self._world.device,
        )
        real = self._comparison.real
        assert real.seen is not None, "these are images"
        _, left_out = measure.usable(self._comparison.metrics, measure.first_rows(real.seen, config.eval_num), real)
        for reason in left_out:
            say(f"note: {reason}")

    def _measured(self, images: Tensor, step: int) -> tuple[dict[str, float], bool]:
        comparison = self._comparison
        assert comparison is not None, "prepared"
        seen = look(comparison.extractor, [images])
        metrics, _ = measure.usable(comparison.metrics, seen, comparison.real)
        found = measure.numbers(metrics, seen, comparison.real)
        return {f"{PREFIX}{name}": value for name, value in found.items()}, self._is_best(found, step)

    def _is_best(self, found: dict[str, float], step: int) -> bool:
        if self._config.keep != "best":
            return False
        name = chosen_number(self._config)
        if name not in found:
            return False
        is_lower_better = _is_lower_better(self._config, name)
        if self._best is None:
            self._best = best_of(self._config.folder / METRICS, name, is_lower_better)
        value, best = found[name], self._best
        if best is not None and not (value < best.value if is_lower_better else value > best.value):
            return False
        self._best = Best(step, value)
        return True


def best_of(path: Path, name: str, is_lower_better: bool) -> Best | None:
    """The best line of a metrics.jsonl by the number of that name; the first of equal ones; None without any."""
    values = [Best(step, value) for step, value in values_of(path, f"{PREFIX}{name}")]
    if not values:
        return None
    return min(values, key=lambda best: best.value if is_lower_better else -best.value)


def chosen_number(config: RunConfig) -> str:
    """What `keep=best` goes by: the number that `objective_metric` names, else the first metric's first.

    Raises:
        InputError: `objective_metric` is a number of none of the metrics.
    """
    known: list[str] = [name for metric in config.metrics.values() for name in registry.component(metric).numbers]
    asked = config.objective_metric or ""
    if not asked.startswith(PREFIX):
        return known[0]
    if asked.removeprefix(PREFIX) not in known:
        allowed = ", ".join(f"{PREFIX}{name}" for name in known)
        raise InputError("objective_metric is a number of none of the metrics", asked, allowed, "metrics=[...]")
    return asked.removeprefix(PREFIX)


def _is_lower_better(config: RunConfig, name: str) -> bool:
    classes = [registry.component(metric) for metric in config.metrics.values()]
    return bool(next(cls.numbers[name] == "lower" for cls in classes if name in cls.numbers))
