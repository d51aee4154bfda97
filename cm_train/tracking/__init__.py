"""What a run tells the world: the terminal, metrics.jsonl, and wandb or TensorBoard.

Importing this takes neither torch nor any of the trackers: each of them is imported when a run wants it.
"""

from .config import OF_ONE_RUN, TrackingConfig, environment
from .metrics_file import last_values
from .progress_bar import progress
from .terminal import complain, say
from .tracker import SilentTracker, Tracker

__all__ = [
    "OF_ONE_RUN",
    "SilentTracker",
    "Tracker",
    "TrackingConfig",
    "complain",
    "environment",
    "last_values",
    "progress",
    "say",
]
