"""plan=true: what was found in the data, and what a run would be and cost, for a person and for programs."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ..core import registry
from ..core.files import write_whole
from ..core.terminal import duration, say
from ..core.wrapping import columns_of, fitted
from ..data import description
from ..data.datasets.base import DatasetConfig
from ..data.datasets.image_folder import ImageFolder
from .config import NO_DATA, Composed
from .forecast import MARGIN, Forecast, forecasts
from .machine import Machine
from .suitability import remarks

_PLAN = "plan.json"
_COLUMNS = 100  # of what goes to no terminal


def show_plan(composed: Composed, machine: Machine, swept: frozenset[str]) -> bool:
    """Print what the run and a missing teacher would be and cost, and write it where `out` says.

    Returns:
        False where measuring was stopped.
    """
    found, classes = None, 0
    if composed.experiment is None or _is_there(composed.config.dataset):
        composed = composed.settled()
        dataset = registry.build(composed.config.dataset)
        dataset.load()
        found, classes = description.describe(dataset), dataset.num_classes
    runs = forecasts(composed, machine, swept, found, classes)
    if runs is None:
        return False
    for line in _all_lines(composed, found, runs):
        print(_hung(line))
    if composed.config.out is not None:
        path = Path(os.path.expanduser(composed.config.out)) / _PLAN
        path.parent.mkdir(parents=True, exist_ok=True)
        plan = {"data": found, "runs": [run.as_dict() for run in runs], "seconds": sum(run.seconds for run in runs)}
        write_whole(path, json.dumps(plan, indent=1).encode())
        say(f"wrote {path}")
    return True


def _is_there(dataset: DatasetConfig) -> bool:
    """Whether a published recipe's images are at hand; it is planned without them too, and none are downloaded."""
    place = dataset.place
    return place is None or (place != NO_DATA and isinstance(dataset, ImageFolder.Config) and os.path.exists(place))


def _hung(line: str) -> str:
    """A line broken between words, its continuation under what it continues."""
    first, *rest = fitted(line, (columns_of(sys.stdout) or _COLUMNS) - MARGIN).split("\n")
    return "\n".join([first, *(" " * MARGIN + more.strip() for more in rest)])


def _all_lines(composed: Composed, found: dict[str, Any] | None, runs: list[Forecast]) -> list[str]:
    config, out = composed.config, []
    if found is not None:
        place = config.dataset.place or config.dataset.name
        out += [f"{'data':<{MARGIN}}{place}", *(f"{'':<{MARGIN}}{line}" for line in description.lines(found))]
        last, size = runs[-1], found["channels"] * found["image_size"] ** 2
        notes = remarks(last.config, found["images"], size, last.sketch.num_parameters, found["classes"])
        out += [f"{'note':<{MARGIN}}{note}" for note in notes]
    if config.objective.without_files() != config.objective:
        out.append(f"{'note':<{MARGIN}}the distance's own network is not counted in memory and time")
    if config.notice:
        out.append(f"{'note':<{MARGIN}}{config.notice}")
    for number, run in enumerate(runs, 1):
        title = f"{number} of {len(runs)}: {'the teacher' if number < len(runs) else 'the student'}"
        out += ["", *([title] if len(runs) > 1 else []), *run.lines()]
    if len(runs) > 1 and all(run.measured for run in runs):
        out += ["", f"{'in all':<{MARGIN}}{duration(sum(run.seconds for run in runs))}"]
    return out
