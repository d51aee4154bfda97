"""TensorBoard: event files in the run folder, for `tensorboard --logdir runs`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import Backend


class TensorBoard(Backend):
    """Scalars, previews and the config in `<run>/tensorboard`.

    Args:
        folder: the run folder; run_config: shown as text.
        step: what the run starts from; whatever older event files hold of later steps is passed over by readers.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, run_config: dict[str, Any], step: int):
        self._folder, self._run_config, self._step = folder / "tensorboard", run_config, step
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
        for name, value in values.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, values["step"])
        self._writer.flush()  # else a killed run lacks steps that its last checkpoint has

    def _image(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def model(self, name: str, files: Mapping[str, Path | str]) -> None:
        """TensorBoard keeps none."""

    def _finish(self) -> None:
        self._writer.close()
