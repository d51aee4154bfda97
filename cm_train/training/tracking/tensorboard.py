"""TensorBoard: event files in the run folder, for `tensorboard --logdir runs`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.run_layout import TENSORBOARD
from .base import Backend


class TensorBoard(Backend):
    """Scalars, previews and the config in `<run>/tensorboard`.

    Args:
        folder: the run folder; run_config: shown as text.
        step: what the run starts from; whatever older event files hold of later steps is passed over by readers.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, run_config: dict[str, Any], step: int):
        self._folder, self._run_config, self._step = folder / TENSORBOARD, run_config, step
        self._is_broken = False
        super().__init__()

    def _open(self) -> None:
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        first = self._step + 1
        self._writer = SummaryWriter(str(self._folder), purge_step=first)
        text = yaml.safe_dump(self._run_config, sort_keys=False, default_flow_style=False)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), first)
        self._writer.flush()

    def _log(self, values: Mapping[str, Any]) -> None:
        with self._written():
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(name, value, values["step"])

    def _image(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        with self._written():
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    @contextmanager
    def _written(self) -> Iterator[None]:
        """What is added in this context is on the disk after it, lest a killed run lack steps of its checkpoint."""
        if self._is_broken:  # a writer that met a full disk does not recover
            raise OSError(f"can't write to {self._folder} any more; {self.rest}")
        try:
            yield
            self._writer.flush()
        except OSError:
            self._is_broken = True
            raise

    def model(self, name: str, files: Mapping[str, Path | str]) -> None:
        """TensorBoard keeps none."""

    def _finish(self) -> None:
        if not self._is_broken:  # else it would wait for ever
            self._writer.close()
