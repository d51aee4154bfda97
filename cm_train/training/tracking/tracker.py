"""What the training loop reports to: the terminal, metrics.jsonl and one tracker beside them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ...core.run_layout import METRICS
from ...core.terminal import complain
from .base import Backend
from .config import TrackingConfig
from .metrics_file import MetricsFile
from .training_progress import Doing, TrainingProgress


class SilentTracker:
    """What ranks other than 0 have in a Tracker's place."""

    def step(self, step: int) -> None:
        """A step is done."""

    def doing(self, what: Doing) -> AbstractContextManager[None]:
        """While the training loop does something else than a step."""
        return nullcontext()

    def log(self, values: Mapping[str, float | None], picture: Path | None = None, beside_s: float = 0.0) -> None:
        """Metrics by name, None for what was not finite, `step` among them; and a preview where there is one.

        `beside_s`: what the rest of the run takes beside its steps.
        """

    def sync(self) -> None:
        """What was logged is to be on the disk."""

    def model(self, files: Mapping[str, Path | str]) -> None:
        """A finished run's averaged weights, by the names that their files have: paths, or a file's text."""

    def __enter__(self) -> "SilentTracker":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Tracker(SilentTracker):
    """All of them together, as a context.

    Args:
        folder: the run folder; step: the step that the run starts from; total: the step it ends at.
        give_up: whether the end may not wait for a slow network any more.
        pictures: whether a tracker beside the run folder gets the previews.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        name: str,
        run_config: dict[str, Any],
        step: int,
        total: int,
        give_up: Callable[[], bool] = lambda: False,
        pictures: bool = True,
    ):
        self._name, self._give_up, self._pictures = name, give_up, pictures
        self._metrics = MetricsFile(folder / METRICS, step)
        self._backend = _backend(config, folder, name, run_config, step)
        self._terminal = TrainingProgress(total, step)

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._terminal.step(step)

    def doing(self, what: Doing) -> AbstractContextManager[None]:
        """While the training loop does something else than a step: shown on the terminal."""
        return self._terminal.doing(what)

    def log(self, values: Mapping[str, float | None], picture: Path | None = None, beside_s: float = 0.0) -> None:
        """The one line of metrics of a step, and the preview made at it.

        Args:
            values: at least step, loss, images_per_s and steps_per_s; None where nothing finite was seen.
            beside_s: what the rest of the run takes beside its steps, for previews and saves.
        """
        try:
            self._metrics.write(values)
        except OSError as error:  # a full disk must not end a run; the checkpoint will say so too
            complain(f"could not write metrics of step {values['step']}: {error.strerror}")
        self._terminal.values(values, beside_s)
        if self._backend is not None:
            self._backend.log(values)
            if picture is not None and self._pictures:
                self._backend.image("samples", picture, int(values["step"] or 0))

    def sync(self) -> None:
        """Force metrics.jsonl to the disk. Raises OSError where that fails."""
        self._metrics.sync()

    def model(self, files: Mapping[str, Path | str]) -> None:
        """A finished run's weights: each file's name and its path, or its text."""
        if self._backend is not None:
            self._backend.model(self._name, files)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self._terminal.close()
        self._metrics.close()
        if self._backend is not None:
            self._backend.close(self._terminal.at_end, self._give_up)


def _backend(config: TrackingConfig, folder: Path, name: str, run_config: dict[str, Any], step: int) -> Backend | None:
    if config.backend == "wandb":
        from .wandb_run import Wandb

        return Wandb(config, folder, name, run_config)
    if config.backend == "tensorboard":
        from .tensorboard import TensorBoard

        return TensorBoard(folder, run_config, step)
    return None
