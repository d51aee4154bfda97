"""The typed config of a run that is there, whichever version began it."""

from pathlib import Path

from ..core import plugins, registry
from ..core.errors import InputError
from ..core.run_layout import CONFIG
from ..core.settings import typed
from ..training.config import RunConfig
from .stored import stored_config


def read_back(folder: Path) -> RunConfig:
    """The typed config of the run in `folder`, which has checkpoints.

    Keys that an older version did not know have their defaults, which mean what that version did.

    Raises:
        InputError: its config.yaml is missing, or is none.
    """
    values = stored_config(folder)
    if values is None:
        raise InputError(
            f"{folder} has checkpoints and no config.yaml", fix="bring it back, or set name=... for a new run"
        )
    try:
        return typed(RunConfig, values, f"{folder / CONFIG}")
    except registry.UnknownComponent as error:
        raise plugins.needed_for(f"run {folder}", values, error) from None
