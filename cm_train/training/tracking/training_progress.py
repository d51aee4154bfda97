"""What the training loop shows on the terminal."""

from collections.abc import Mapping
from typing import Any

from ...core.progress import Progress


class TrainingProgress:
    """Steps done, the newest values beside them, and the time left."""

    def __init__(self, total: int, start: int, every_s: float | None = None):
        self._total = total
        self._progress = Progress(total, "step", start, leads=True, every_s=every_s).__enter__()

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._progress.move(step)

    def values(self, values: Mapping[str, Any]) -> None:
        """Newly logged values."""
        loss = values.get("loss")
        parts = ["loss -" if loss is None else f"loss {loss:.4g}", f"{values['images_per_s']:.0f} images/s"]
        if values.get("skipped", 0) > 0:
            parts.append(f"{values['skipped']:.0f} skipped")
        step = self._progress.done
        self._progress.update(step, "  ".join(parts), (self._total - step) / max(values["steps_per_s"], 1e-9))

    def close(self) -> None:
        """Leave the terminal as it is."""
        self._progress.__exit__()

    @property
    def at_end(self) -> bool:
        """Whether the last step is done."""
        return self._progress.done >= self._total
