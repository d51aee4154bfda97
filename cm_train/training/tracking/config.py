"""The `tracking` group."""

import importlib.util
import os
from collections.abc import Mapping, Set
from netrc import NetrcParseError, netrc
from typing import Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from ...core.errors import InputError
from ...core.settings import Settings

# wandb's own names for what the command line may leave open.
_VARIABLES = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "group": "WANDB_RUN_GROUP"}
_TAGS = "WANDB_TAGS"
# Words that choose a tracker; not the group and tags, which a sweep sets.
_CHOOSES = frozenset(["tracking", "tracking.backend", "tracking.project", "tracking.entity"])
# Those that mean one run. Where a command trains several, its teacher and its sweep's jobs must not share them.
OF_ONE_RUN = ("WANDB_NAME", "WANDB_RUN_ID", "WANDB_SWEEP_ID")


def group_of_environment() -> str | None:
    """The group that wandb's variable names; None where it is not set, or empty."""
    return os.environ.get(_VARIABLES["group"], "").strip() or None


def tags_of_environment() -> list[str]:
    """The tags that wandb's variable lists."""
    return [tag for part in os.environ.get(_TAGS, "").split(",") if (tag := part.strip())]


def chooses_tracker(asked: Set[str]) -> bool:
    """Whether somebody who set these keys and groups on the command line has chosen a tracker.

    Who has knows where pictures go, so that `previews: auto` means true; a login for other work must not send one's own
    anywhere.
    """
    return bool(asked & _CHOOSES)


def has_wandb_login() -> bool:
    """Whether wandb finds a key here, in its variable or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return netrc(os.environ.get("NETRC")).authenticators(server) is not None
    except (OSError, NetrcParseError):
        return False


class TrackingConfig(Settings):
    """Where metrics and previews go beside the run folder; all but `backend` and `previews` is for wandb.

    A key that is left open has the value of wandb's own variable, where that is set.
    """

    backend: Literal["wandb", "tensorboard", "none"] = "wandb"
    project: str = "cm_train"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []
    artifact: bool = False  # whether a finished run's averaged weights are uploaded
    # Whether the tracker gets the pictures; auto: those of published data sets
    previews: bool | Literal["auto"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        given = {key: value for key, value in values.items() if value not in (None, [])}
        said: dict[str, object] = {key: os.environ.get(name, "").strip() for key, name in _VARIABLES.items()}
        said["tags"] = tags_of_environment()
        return {key: value for key, value in said.items() if value} | given

    def sends_pictures(self, published: bool) -> bool:
        """Whether the tracker gets pictures like those of a data set that is published, or is not."""
        return published if self.previews == "auto" else self.previews

    def check_machine(self) -> None:
        """Whether the tracker is installed here. Raises InputError."""
        if self.backend == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "tracking=tensorboard needs a package that is not installed",
                "no tensorboard here",
                fix="pip install 'cm-train[tensorboard]', or tracking=wandb or none",
            )
