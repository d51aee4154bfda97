"""What a run tells the world: the terminal, metrics.jsonl, and wandb or TensorBoard.

Importing this takes neither torch nor any of the trackers: each of them is imported when a run wants it.
"""

from ...core.progress import progress
from ...core.terminal import complain, say
from .config import (
    OF_ONE_RUN,
    TrackingConfig,
    chooses_tracker,
    group_of_environment,
    has_wandb_login,
    tags_of_environment,
)
from .metrics_file import last_values
from .tracker import SilentTracker, Tracker

__all__ = [
    "OF_ONE_RUN",
    "SilentTracker",
    "Tracker",
    "TrackingConfig",
    "chooses_tracker",
    "complain",
    "group_of_environment",
    "has_wandb_login",
    "last_values",
    "progress",
    "say",
    "tags_of_environment",
]
