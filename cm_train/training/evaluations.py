"""Numbers of a run's images as it trains: those of cm-eval, by the same code."""

import time

from torch import Tensor

from ..core.errors import InputError
from ..core.memory import needed_memory
from ..core.signals import Stopped
from ..core.terminal import complain, say
from ..core.world import World
from ..data.datasets.base import Dataset
from ..evaluation import measure
from ..evaluation.comparison import Comparison, compare_with
from ..evaluation.seen import look
from ..evaluation.sources import loaded, with_classes
from ..models.denoiser import Denoiser
from .best import Best, best_checkpoint, chosen_number, is_better
from .config import PREFIX, RunConfig
from .drawing import draw_together

_FOR_LESS = "micro_batch=..., or eval_every=0"


class Evaluations:
    """What `eval_every` asks for; every rank calls its methods alike. No trouble in one ends the run.

    Args:
        dataset: what is trained on, which the images are compared with.
        batch_size: images at once on a rank.

    Attributes:
        took_s: what the last one took.
        is_best: whether no checkpoint of the run is as good as the last one was, by what `keep=best` goes by.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, batch_size: int, world: World):
        self._config, self._dataset, self._batch_size, self._world = config, dataset, batch_size, world
        self._comparison: Comparison | None = None
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

    def make(self, denoiser: Denoiser, step: int) -> dict[str, float]:
        """Numbers of the images of the seeds from 0 on, by name; none where memory ran out, or a signal came."""
        began, self.is_best = time.monotonic(), False
        numbers: dict[str, float] = {}
        images = draw_together(denoiser, self._config.eval_num, self._batch_size, self._world, "evaluation", _FOR_LESS)
        if images is not None:
            try:
                numbers, self.is_best = self._world.run_on_main(lambda: self._measured(images, step))
            except Stopped:  # which the loop sees next, and saves
                numbers = {}
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
        try:
            seen = look(comparison.extractor, [images])
            metrics, _ = measure.usable(comparison.metrics, seen, comparison.real)
            found = measure.numbers(metrics, seen, comparison.real)
        except InputError as error:
            complain(f"no evaluation of step {step}: {error}")
            return {}, False
        except Exception as error:
            needed = needed_memory(error)
            if needed is None:
                raise
            complain(f"no evaluation, for want of memory: {needed}; fix: {_FOR_LESS}")
            return {}, False
        return {f"{PREFIX}{name}": value for name, value in found.items()}, self._is_best(found, step)

    def _is_best(self, found: dict[str, float], step: int) -> bool:
        name = chosen_number(self._config)
        if self._config.keep != "best" or name not in found:
            return False
        best = best_checkpoint(self._config, before=step)
        return best is None or is_better(self._config, Best(step, found[name]), best)
