"""Between what Hydra composes, what a run folder stores, and the typed config of a run."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ..core import registry
from ..core.errors import InputError
from ..core.run_layout import CONFIG
from ..objectives.noise import check_noise
from ..training.config import RunConfig, dump
from .stored import stored_config

# Groups that name a component, and the kind of it.
_GROUPS = {
    "dataset": "dataset",
    "backbone": "backbone",
    "objective": "objective",
    "optimizer": "optimizer",
    "ema": "decay",
}


def parse(cfg: DictConfig) -> RunConfig:
    """The typed config of a composed one, every component's settings checked.

    Raises:
        InputError: a missing, unknown or ill-typed key, with its full name.
    """
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        text = f"{key} is missing" if isinstance(error, MissingMandatoryValue) else str(error).splitlines()[0]
        raise InputError(text, fix=f"set {key}=..." if key else None) from None
    assert isinstance(values, dict)
    if isinstance(values.get("compile"), bool):  # YAML reads true as a boolean, beside "auto"
        values["compile"] = str(values["compile"]).lower()
    config = registry.typed(RunConfig, values)
    for group, kind in _GROUPS.items():
        registry.settings(kind, getattr(config, group), group)
    config = _with_decay(config)
    _check_together(config)
    return config


def _with_decay(config: RunConfig) -> RunConfig:
    """`config` with its half-life as the decay that it is; older runs have only that, and a resume compares it."""
    decay = registry.settings("decay", config.ema).final_decay(config.batch_size)
    return config.model_copy(update={"ema": config.ema | {"decay": decay, "half_life_images": None}})


def _check_together(config: RunConfig) -> None:
    """What no single key can tell; found now rather than after a teacher has trained."""
    config.sampling.check_above(config.noise.sigma_min)
    check_noise(config.noise, registry.find("objective", config.objective["name"]).levels)
    if config.guidance != 1 and not config.loss_needs_teacher():
        raise InputError(f"mode {config.mode} has no teacher to guide", f"guidance={config.guidance}", "1", "mode=cd")
    if config.teacher is not None and not config.needs_teacher():
        fix = "drop teacher=, or start from its weights with init=teacher"
        raise InputError(f"mode {config.mode} takes no teacher", config.teacher, "null", fix)


def complete(config: RunConfig) -> dict[str, Any]:
    """`dump` with the defaults of keys that the components' groups lack: a run of an older version knew fewer."""
    values = dump(config)
    for group, kind in _GROUPS.items():
        values[group] = registry.settings(kind, values[group]).model_dump() | values[group]
    return values


def read_back(folder: Path) -> RunConfig:
    """The typed config of the run in `folder`, which has checkpoints.

    Raises:
        InputError: its config.yaml is missing, or is none.
    """
    values = stored_config(folder)
    if values is None:
        raise InputError(
            f"{folder} has checkpoints and no config.yaml", fix="bring it back, or set name=... for a new run"
        )
    return registry.typed(RunConfig, values, f"{folder / CONFIG}")
