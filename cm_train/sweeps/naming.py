"""What a sweep calls its jobs' runs, and what it tags their curves with."""

import hashlib
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ..core.run_layout import clean
from ..training.tracking import OF_ONE_RUN, group_of_environment, tags_of_environment
from .records import SweepRecord

_LONGEST_TAG = 64  # wandb's limit
_LONGEST_RUN = 120  # of a run; what is longer is cut and told apart by a hash


def name_run(cfg: DictConfig, sweep: SweepRecord) -> None:
    """Name the job's run after what it sets, tag its curves with that, and group them by the sweep."""
    own = own_settings(sweep)
    named = {"dataset", "dataset.root", "mode"} if str(cfg.name) == f"{cfg.data_name}-{cfg.mode}" else set()
    # In one order, whatever the command line's.
    parts = sorted(p for p in own if p.split("=")[0] not in named and p != f"experiment={cfg.name}")
    if parts and not {"name", "run_dir"} & set(sweep.keys):
        cfg.name = _shortened("-".join([str(cfg.name), *(clean(part) for part in parts)]))
    cfg.tracking.tags = [*(cfg.tracking.tags or tags_of_environment()), *(part[:_LONGEST_TAG] for part in own)]
    if cfg.tracking.group is None:
        cfg.tracking.group = group_of_environment() or Path(HydraConfig.get().sweep.dir).name
    for variable in OF_ONE_RUN:
        os.environ.pop(variable, None)


def _shortened(name: str) -> str:
    if len(name) <= _LONGEST_RUN:
        return name
    return f"{name[: _LONGEST_RUN - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def own_settings(sweep: SweepRecord) -> list[str]:
    """What this job sets of what is swept, as "seed=0"."""
    hydra = HydraConfig.get()
    swept = set(sweep.keys) | set(dict(hydra.sweeper.get("params") or {}))
    words: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    overrides = OverridesParser.create().parse_overrides(words)
    return [f"{o.key_or_group}={o.get_value_string()}" for o in overrides if o.key_or_group in swept]
