"""What a student's data have as its teacher's, where nobody says it: the size of the images, and what is held out."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.run_layout import run_of
from ..core.terminal import say
from ..models.checkpoints import find
from ..training.config import RunConfig
from .sizes import AUTO, Values
from .stored import stored_config


def as_teacher(config: RunConfig, dataset: Mapping[str, Any]) -> Values:
    """The keys of `dataset`, as it was composed, that are as those of a teacher which is there already."""
    wanted = {key for key in ("image_size", "holdout") if dataset.get(key) == AUTO}
    if not wanted or not config.needs_teacher():
        return {}
    place = config.teacher or str(config.usual_teacher)
    try:
        image_size = find.peek(place).denoiser.image_size
    except InputError:  # there is none yet; whoever needs it says so
        return {}
    taken: Values = {"image_size": image_size} if "image_size" in wanted else {}
    if "holdout" in wanted:
        taken |= _held_out(place, dataset)
    return taken


def _held_out(place: str, dataset: Mapping[str, Any]) -> Values:
    """What the teacher's run held out. Where nobody knows, nothing: it may have seen any picture."""
    its_data: Any = None
    with contextlib.suppress(InputError):
        its_data = (stored_config(run_of(Path(place).expanduser())) or {}).get("dataset")
    its_data = its_data if isinstance(its_data, Mapping) else {}
    share, group = its_data.get("holdout", 0.0), its_data.get("group")
    if share == 0:
        say(f"holding out none, as teacher {place} has seen all pictures (dataset.holdout=0.05 holds some out)")
        return {"holdout": 0.0}
    say(f"holding out what teacher {place} does: dataset.holdout={share}{f', dataset.group={group}' if group else ''}")
    return {"holdout": share} | ({"group": group} if dataset.get("group") is None else {})
