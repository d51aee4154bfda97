"""The `tracking` group."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from ...core.errors import InputError
from ...core.settings import Settings

# wandb's own names for what the command line may leave open.
_VARIABLES = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "group": "WANDB_RUN_GROUP", "tags": "WANDB_TAGS"}
# Those that mean one run. Where a command trains several, its teacher and its sweep's jobs must not share them.
OF_ONE_RUN = ("WANDB_NAME", "WANDB_RUN_ID", "WANDB_SWEEP_ID")


def environment(key: str) -> Any:
    """What wandb's variable for a key of `tracking` says; None where it is not set, or empty."""
    given = os.environ.get(_VARIABLES[key], "").strip()
    if key == "tags":
        return [tag for part in given.split(",") if (tag := part.strip())] or None
    return given or None


class TrackingConfig(Settings):
    """Where metrics and previews go beside the run folder; all but `backend` is for wandb.

    A key that is left open has the value of wandb's own variable, where that is set.
    """

    backend: Literal["wandb", "tensorboard", "none"] = "wandb"
    project: str = "cm_train"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []
    artifact: bool = False  # whether a finished run's averaged weights are uploaded

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        left_open = {key for key in _VARIABLES if values.get(key) in (None, [])}
        said = {key: value for key in left_open if (value := environment(key)) is not None}
        return {key: value for key, value in values.items() if key not in left_open} | said

    def check_machine(self) -> None:
        """Whether the tracker is installed here. Raises InputError."""
        if self.backend == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "tracking=tensorboard needs a package that is not installed",
                "no tensorboard here",
                fix="pip install 'cm-train[tensorboard]', or tracking=wandb or none",
            )
