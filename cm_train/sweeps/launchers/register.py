"""Our launchers and sweepers, made known to Hydra, which by itself takes none from outside its own namespace."""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

from ...core import configs
from ...core.errors import InputError

# What the presets in conf/hydra call hydra_plugins.cm_train.<name>, and where it is.
_CLASSES = {
    "JoblibLauncher": "cm_train.sweeps.launchers.joblib",
    "LocalLauncher": "cm_train.sweeps.launchers.slurm",
    "SlurmLauncher": "cm_train.sweeps.launchers.slurm",
    "OptunaSearch": "cm_train.sweeps.optuna_search",
}


class _NotInstalled(Launcher, Sweeper):
    """What a preset leads to without its package."""

    def __init__(self, **_: Any) -> None:
        pass

    def setup(self, **_: Any) -> None:
        raise InputError(
            "this launcher or sweeper needs a package that is not installed", fix="pip install 'cm-train[sweeps]'"
        )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise AssertionError("setup comes first, and ends it")

    def sweep(self, arguments: list[str]) -> Any:
        raise AssertionError("setup comes first, and ends it")


def register() -> None:
    """Call this before Hydra composes anything.

    The plugins' own presets go where ours have their names: Hydra would check ours against them, and refuse keys.
    """
    known = Plugins.instance().class_name_to_class
    ours = ModuleType("hydra_plugins.cm_train")
    for name, home in _CLASSES.items():
        try:
            plugin = getattr(importlib.import_module(home), name)
        except ImportError:
            plugin = _NotInstalled
        known[f"{ours.__name__}.{name}"] = plugin
        setattr(ours, name, plugin)
    sys.modules[ours.__name__] = ours
    stored = ConfigStore.instance().repo["hydra"]
    for path in configs.conf_dir().glob("hydra/*/*.yaml"):
        stored.get(path.parent.name, {}).pop(path.name, None)


def works_side_by_side(launcher: str) -> bool:
    """Whether a launcher's `_target_` is the one whose jobs share this machine."""
    return launcher.endswith(".JoblibLauncher")
