"""Components and configs of other people's packages, which a user's command allows by name: plugins=[their_package].

Such a package names its module of components under the entry point `cm_train.components`, and brings its YAML in a
folder `conf` of its own. Nothing of a package is imported because a config or checkpoint names it.
"""

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from . import registry
from .errors import InputError

_ENTRY_POINTS = "cm_train.components"
_NAME = re.compile(r"[\w.-]{1,100}")
_ALLOWED = "CM_TRAIN_PLUGINS"  # how a command's ranks hear of those that its user has allowed


def installed() -> dict[str, metadata.EntryPoint]:
    """The plugins that are installed here, by name."""
    return {point.name: point for point in metadata.entry_points(group=_ENTRY_POINTS)}


def load(names: Iterable[str]) -> None:
    """Import what the user has allowed, so that its components are registered.

    Raises:
        InputError: no such plugin is installed, or its module can't be imported.
    """
    names = list(names)
    for name in names:
        point = _find(name)
        try:
            with registry.registering_for(name):
                point.load()
        except (Exception, SystemExit) as error:  # somebody else's code
            what = f"plugin {name} can't be imported"
            raise InputError(what, f"{type(error).__name__}: {error}", fix="repair it, or drop plugins=") from error
    os.environ[_ALLOWED] = ",".join(names)


def names_in(values: Mapping[Any, Any]) -> list[str]:
    """The names under `plugins` in a config that nobody has typed yet; what else is there is refused once it is."""
    given = values.get("plugins")
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else []


def load_in_rank() -> None:
    """Import what the user of the command has allowed that started this rank."""
    load(filter(None, os.environ.get(_ALLOWED, "").split(",")))


def needed_for(what: str, stored: Mapping[str, Any], error: registry.UnknownComponent) -> InputError:
    """What to say of a stored config or manifest that names a component which is not known here.

    Args:
        what: the run or checkpoint.
        stored: its values, `plugins` among them where it needs any.
    """
    names = [name for name in names_in(stored) if _NAME.fullmatch(name)]  # a stranger wrote them
    whom = "it" if len(names) == 1 else "them"
    fix = f"plugins=[{','.join(names)}], once you trust {whom}" if names else None
    return InputError(f"{what} has a part that is not known here: {error.what}", fix=fix)


def conf_folders(names: Iterable[str]) -> list[Path]:
    """The folders of configs that plugins bring; nothing is imported. Raises InputError, as `load` does."""
    folders = []
    for name in names:
        package = importlib.util.find_spec(_find(name).module.partition(".")[0])
        places = [] if package is None else package.submodule_search_locations or []
        folders += [folder for place in places if (folder := Path(place) / "conf").is_dir()]
    return folders


def _find(name: str) -> metadata.EntryPoint:
    known = installed()
    if name not in known:
        allowed = ", ".join(sorted(known)) or "none is installed"
        raise InputError("no such plugin", name, allowed, f"pip install the package, which has {_ENTRY_POINTS!r}")
    return known[name]
