"""Checkpoints that another run needs, which their own run's `keep` spares."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from ...core.files import is_there, read_small, write_whole
from ...core.run_layout import CONFIG

_NEEDED_BY = ".needed_by_"


def mark_needed(folder: Path, by: Path) -> None:
    """Have `keep` spare a checkpoint for as long as the run in `by` is there, where this user may write there.

    It is looked for where it is now, and as far away from the checkpoint as it is now: both may move together.
    """
    run = os.path.realpath(by)
    places = [run, os.path.relpath(run, os.path.realpath(folder))]
    mark = folder / f"{_NEEDED_BY}{hashlib.sha256(os.fsencode(run)).hexdigest()[:16]}"
    with contextlib.suppress(OSError, ValueError):
        write_whole(mark, json.dumps(places).encode())


def is_needed(folder: Path) -> bool:
    """Whether a run that was marked as needing this checkpoint may still be there."""
    return any(map(_may_need, folder.glob(f"{_NEEDED_BY}*[0-9a-f]")))


def _may_need(mark: Path) -> bool:
    try:
        places = [str(place) for place in json.loads(read_small(mark, 1 << 14))]
        return any(is_there(os.path.join(mark.parent, place, CONFIG)) for place in places)
    except (OSError, ValueError, TypeError, RecursionError):
        return True  # what can't be told is no reason to delete anything
