"""What the training loop shows on the terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from ...core.progress import Progress

Doing = Literal["training", "preview", "metrics", "saving"]
_WIDTH = 8  # of the longest: what stands beside the word does not move


class TrainingProgress:
    """What is being done, steps done, the newest values beside them, and the time left."""

    def __init__(self, total: int, start: int, every_s: float | None = None):
        self._total = total
        phase = "training".ljust(_WIDTH)
        self._progress = Progress(total, "step", start, leads=True, every_s=every_s, phase=phase).__enter__()

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._progress.move(step)

    @contextmanager
    def doing(self, what: Doing) -> Iterator[None]:
        """While something else than a step is done."""
        self._progress.call(what.ljust(_WIDTH))
        try:
            yield
        finally:
            self._progress.call("training".ljust(_WIDTH))

    def values(self, values: Mapping[str, Any], beside_s: float = 0.0) -> None:
        """Newly logged values; what is still to come takes `beside_s` beside its steps."""
        loss = values.get("loss")
        parts = ["loss -" if loss is None else f"loss {loss:.4g}", f"{values['images_per_s']:.0f} images/s"]
        if values.get("skipped", 0) > 0:
            parts.append(f"{values['skipped']:.0f} skipped")
        step = self._progress.done
        left_s = (self._total - step) / max(values["steps_per_s"], 1e-9) + beside_s
        self._progress.update(step, "  ".join(parts), left_s)

    def close(self) -> None:
        """Leave the terminal as it is."""
        self._progress.__exit__()

    @property
    def at_end(self) -> bool:
        """Whether the last step is done."""
        return self._progress.done >= self._total
