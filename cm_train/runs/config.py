"""Between what Hydra composes, what a run folder stores, and the typed config of a run."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ..core import plugins, registry
from ..core.errors import InputError
from ..core.run_layout import CONFIG
from ..core.settings import typed
from ..objectives.noise import check_noise
from ..training.config import RunConfig
from .stored import stored_config

# What a teacher that is trained for a student has in common with it, beside data and network.
_SHARED_WITH_TEACHER = frozenset(["devices", "precision", "compile", "deterministic", "seed", "plugins"])
_USUAL_DROPOUT = 0.1  # of a teacher's labels, so that it can be guided


@dataclass(frozen=True)
class Composed:
    """The config that a command composed, and what Hydra alone knows of how it came about.

    Attributes:
        asked: the keys and groups that words of the command line set.
        is_sweep: whether it is one of a multirun's.
    """

    config: RunConfig
    asked: frozenset[str]
    is_sweep: bool
    _cfg: DictConfig

    @classmethod
    def of(cls, cfg: DictConfig) -> "Composed":
        """Raises InputError, see `parse`."""
        hydra = HydraConfig.get()
        # ${...} in a word is not for the list of words to resolve.
        words: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        asked = frozenset(str(word).lstrip("+").split("=")[0] for word in words)
        config = parse(cfg)
        config = config.model_copy(update={"tracking": config.tracking.if_asked_for(asked)})
        return cls(config, asked, hydra.mode == RunMode.MULTIRUN, cfg)

    def teacher(self, folder: Path, swept: Set[str]) -> RunConfig:
        """The config of a teacher for this run: mode=edm with its own recipe on the same data, by the same network.

        Args:
            folder: where the teacher's run lies.
            swept: keys in which the jobs of a sweep differ: whichever came first would have a say.
        """
        config = self.config
        hydra = HydraConfig.get()
        places = [word for word in hydra.overrides.hydra if word.startswith("hydra.searchpath")]
        cfg = compose("train", overrides=[*places, "mode=edm", f"dataset={hydra.runtime.choices['dataset']}"])
        with open_dict(cfg):
            cfg.dataset = self._cfg.dataset
        teacher = parse(cfg)
        tags = [tag for tag in config.tracking.tags if tag.split("=")[0] not in swept]
        tracking = teacher.tracking if "tracking" in swept else config.tracking
        may_hide = bool({"guidance", "label_dropout"} & swept) and config.dataset.conditional
        hides = config.guidance != 1 or config.label_dropout > 0 or may_hide
        return teacher.model_copy(
            update={key: getattr(config, key) for key in _SHARED_WITH_TEACHER - swept}
            | {
                "name": folder.name,
                "run_dir": str(folder),
                "backbone": config.backbone.with_recipe_of(teacher.backbone),
                "tracking": tracking.model_copy(update={"tags": tags}),
                "label_dropout": _USUAL_DROPOUT if hides else teacher.label_dropout,
            }
        )


def _refuse_half_life(images: float) -> None:
    """${half_life:500000} was how 0.1.0 wrote one."""
    raise InputError("${half_life:...} is a key now", fix=f"ema.half_life_images={images} in the place of ema.decay")


OmegaConf.register_new_resolver("half_life", _refuse_half_life)


def parse(cfg: DictConfig) -> RunConfig:
    """The typed config of a composed one.

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
    plugins.load(plugins.names_in(values))
    config = typed(RunConfig, values)
    config = config.model_copy(update={"ema": config.ema.with_decay(config.batch_size)})
    _check_together(config)
    return config


def _check_together(config: RunConfig) -> None:
    """What no single key can tell; found now rather than after a teacher has trained."""
    config.sampling.check_above(config.noise.sigma_min)
    check_noise(config.noise, registry.component(config.objective).levels)
    if config.guidance != 1 and not config.objective.needs_teacher():
        raise InputError(f"mode {config.mode} has no teacher to guide", f"guidance={config.guidance}", "1", "mode=cd")
    if config.teacher is not None and not config.needs_teacher():
        fix = "drop teacher=, or start from its weights with init=teacher"
        raise InputError(f"mode {config.mode} takes no teacher", config.teacher, "null", fix)


def read_back(folder: Path) -> RunConfig:
    """The typed config of the run in `folder`, which has checkpoints.

    Keys that an older version did not know have their defaults, which mean what that version did.

    Raises:
        InputError: its config.yaml is missing, or is none.
    """
    values = stored_config(folder)
    if values is None:
        raise InputError(
            f"{folder} has checkpoints and no config.yaml", fix="bring it back, or set name=... for a new run"
        )
    try:
        return typed(RunConfig, values, f"{folder / CONFIG}")
    except registry.UnknownComponent as error:
        raise plugins.needed_for(f"run {folder}", values, error) from None
