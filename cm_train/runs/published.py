"""What is particular to published recipes, the options of `experiment`."""

from collections.abc import Iterable, Mapping, Set
from pathlib import Path

import yaml

from ..core.errors import InputError


def check_alone(asked: Set[str], choices: Mapping[str, str | None], places: Iterable[str]) -> None:
    """Refuse another mode or data set beside an experiment that says its own: what it sets would mean something else.

    Args:
        asked: the keys and groups that words of the command line set.
        choices: the option that was chosen of each group.
        places: the folders of configs.

    Raises:
        InputError: one is asked for.
    """
    name = choices.get("experiment")
    if name is None:
        return
    for group in sorted({"mode", "dataset"} & asked & _chosen_by(name, places)):
        fix = f"drop {group}=, or drop experiment= for settings that suit your data"
        raise InputError(f"experiment={name} says its own {group}", f"{group}={choices[group]}", fix=fix)


def _chosen_by(experiment: str, places: Iterable[str]) -> set[str]:
    """The groups that an experiment chooses from."""
    for place in places:
        path = Path(place) / "experiment" / f"{experiment}.yaml"
        if path.is_file():
            entries = (yaml.safe_load(path.read_text()) or {}).get("defaults") or []
            keys = [str(key) for entry in entries if isinstance(entry, dict) for key in entry]
            return {key.removeprefix("override").strip().lstrip("/") for key in keys}
    return set()
