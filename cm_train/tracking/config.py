"""The `tracking` group."""

import importlib.util
from typing import Literal

from ..errors import InputError
from ..registry import Settings


class TrackingConfig(Settings):
    """Where metrics and previews go beside the run folder; all but `backend` is for wandb."""

    backend: Literal["wandb", "tensorboard", "none"] = "wandb"
    project: str = "cm_train"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []
    artifact: bool = False  # whether a finished run's averaged weights are uploaded

    def check_machine(self) -> None:
        """Whether the tracker is installed here. Raises InputError."""
        if self.backend == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "tracking=tensorboard needs a package that is not installed",
                "no tensorboard here",
                fix="pip install 'cm-train[tensorboard]', or tracking=wandb or none",
            )
