"""The `tracking` group."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from ...core.errors import InputError
from ...core.settings import Settings

# wandb's own names for what the command line may leave open.
_VARIABLES = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "group": "WANDB_RUN_GROUP"}
_TAGS = "WANDB_TAGS"
# Those that mean one run. Where a command trains several, its teacher and its sweep's jobs must not share them.
OF_ONE_RUN = ("WANDB_NAME", "WANDB_RUN_ID", "WANDB_SWEEP_ID")


def group_of_environment() -> str | None:
    """The group that wandb's variable names; None where it is not set, or empty."""
    return os.environ.get(_VARIABLES["group"], "").strip() or None


def tags_of_environment() -> list[str]:
    """The tags that wandb's variable lists."""
    return [tag for part in os.environ.get(_TAGS, "").split(",") if (tag := part.strip())]


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
    def _filled(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        given = {key: value for key, value in values.items() if value not in (None, [])}
        said: dict[str, object] = {key: os.environ.get(name, "").strip() for key, name in _VARIABLES.items()}
        said["tags"] = tags_of_environment()
        return {key: value for key, value in said.items() if value} | given

    def check_machine(self) -> None:
        """Whether the tracker is installed here. Raises InputError."""
        if self.backend == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "tracking=tensorboard needs a package that is not installed",
                "no tensorboard here",
                fix="pip install 'cm-train[tensorboard]', or tracking=wandb or none",
            )
