"""From what Hydra composes to the typed config of a run."""

import dataclasses
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ..core import plugins, registry
from ..core.errors import InputError
from ..core.settings import OF_RECIPE, typed
from ..core.terminal import say
from ..data.datasets.base import Facts
from ..objectives.noise import check_noise
from ..training.best import chosen_number
from ..training.config import RunConfig, dump
from ..training.tracking import chooses_tracker
from .as_teacher import as_teacher
from .plan import settle, settle_as, settle_plainly
from .published import check_alone
from .sizes import AUTO, Values

# What a teacher that is trained for a student has in common with it, beside data and network.
_SHARED_WITH_TEACHER = frozenset(["devices", "precision", "compile", "deterministic", "seed", "plugins", "data_name"])
_USUAL_DROPOUT = 0.1  # of a teacher's labels, so that it can be guided
_LARGEST, _LARGEST_ON_CPU = 64, 32  # side of own pictures, where nobody sets it
NO_DATA = "(no data)"  # stands for the root of a published recipe that is planned without its data
_UNSEEN = Facts(32, 3, 10_000)  # stands for pictures that nobody has looked at yet


@dataclass(frozen=True)
class Composed:
    """The config that a command composed, and what Hydra alone knows of how it came about.

    Attributes:
        config: typed. Until it is `settled`, what the data decide is as for usual ones, and all else as it stays.
        asked: the keys and groups that words of the command line set.
        is_sweep: whether it is one of a multirun's.
        experiment: the published recipe that was chosen, if any.
    """

    config: RunConfig
    asked: frozenset[str]
    is_sweep: bool
    _cfg: DictConfig
    _values: Values
    _is_plain: bool
    experiment: str | None = None
    _facts: Facts | None = None

    @classmethod
    def of(cls, cfg: DictConfig, in_sweep: bool = False) -> "Composed":
        """Raises InputError, see `parse`.

        Args:
            in_sweep: whether it stands for a job of a sweep, although it was composed alone.
        """
        hydra = HydraConfig.get()
        # ${...} in a word is not for the list of words to resolve.
        words: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
        asked = frozenset(str(word).lstrip("+").split("=")[0] for word in words)
        places = [source.path for source in hydra.runtime.config_sources]
        check_alone(asked, hydra.runtime.choices, places)
        experiment = hydra.runtime.choices.get("experiment")
        if cfg.plan is True and experiment is not None and OmegaConf.is_missing(cfg.dataset, "root"):
            with open_dict(cfg):
                cfg.dataset.root = NO_DATA
        if chooses_tracker(asked) and OmegaConf.select(cfg, "tracking.previews") == AUTO:
            cfg.tracking.previews = True
        values, is_plain = plain_values(cfg), hydra.runtime.choices.get("recipe") in (None, "none")
        if values.get("budget") is not None and values.get("steps") != AUTO:
            raise InputError("budget and steps say one thing", f"budget={values['budget']}", fix="drop one of them")
        is_sweep = in_sweep or hydra.mode == RunMode.MULTIRUN
        return cls(_typed(values, _UNSEEN, is_plain), asked, is_sweep, cfg, values, is_plain, experiment)

    def called(self, data_name: str) -> "Composed":
        """The same for runs that are called after `data_name`, where no word of the command says otherwise."""
        if {"data_name", "name", "run_dir"} & self.asked:
            return self
        cfg = self._cfg.copy()
        with open_dict(cfg):
            cfg.data_name = data_name
        values = plain_values(cfg)
        config = _typed(values, self._facts or _UNSEEN, self._is_plain)
        return dataclasses.replace(self, config=config, _cfg=cfg, _values=values)

    def looked(self) -> "Composed":
        """The same after a look at the images, as far as something hangs on them. Raises InputError without any."""
        largest = _LARGEST if torch.cuda.is_available() else _LARGEST_ON_CPU
        if self._facts is not None:
            return self
        values = self._values | {"dataset": self._values["dataset"] | as_teacher(self.config, self._values["dataset"])}
        dataset = registry.settings("dataset", values["dataset"])
        facts: Facts = dataset.facts(largest)
        for remark in facts.remarks:
            say(remark)
        return dataclasses.replace(self, _values=values, _facts=facts)

    @property
    def facts(self) -> Facts:
        """What is known of the images once somebody has `looked`."""
        return self._facts or _UNSEEN

    def settled(
        self, stored: RunConfig | None = None, images: int | None = None, like: RunConfig | None = None
    ) -> "Composed":
        """The same with a number for each `auto`.

        Args:
            stored: the run that goes on, whose numbers count; None for a new one.
            images: how many the run shall train on; None: what its settings say.
            like: see `plan.settle`.
        """
        if stored is not None:
            config = _typed(settle_as(self._values, dump(stored)), _UNSEEN, self._is_plain)
            return dataclasses.replace(self, config=config)
        known = self.looked()
        return dataclasses.replace(known, config=_typed(known._values, known.facts, self._is_plain, images, like))

    def teacher(
        self, folder: Path, swept: Set[str], images: int | None = None, like: RunConfig | None = None
    ) -> RunConfig:
        """The config of a teacher for this run: mode=edm, or a published recipe, on the same data.

        By mode=edm it has this run's network.

        Args:
            folder: where the teacher's run lies.
            swept: keys in which the jobs of a sweep differ: whichever came first would have a say.
            images: how many it shall train on; None: what its recipe says.
            like: see `plan.settle`.
        """
        config = self.config
        hydra = HydraConfig.get()
        places = [word for word in hydra.overrides.hydra if word.startswith("hydra.searchpath")]
        named = config.teacher_experiment
        choice = ["mode=edm", f"dataset={hydra.runtime.choices['dataset']}"]
        cfg = compose("train", overrides=[*places, *([f"experiment={named}"] if named else choice)])
        with open_dict(cfg):
            cfg.dataset = self._cfg.dataset
            cfg.data_name = self._cfg.data_name
        values = plain_values(cfg)
        values["dataset"] = dict(config.dataset)
        if named is None:  # the student's network, as far as it is not settled by the run's length
            own = values["backbone"]
            of_recipe = {key: own[key] for key in config.backbone.marked(OF_RECIPE) if key in own}
            values["backbone"] = self._values["backbone"] | of_recipe
        teacher = _typed(values, self.facts, False, images, like)
        tags = [tag for tag in config.tracking.tags if tag.split("=")[0] not in swept]
        tracking = teacher.tracking if "tracking" in swept else config.tracking
        may_hide = bool({"guidance", "label_dropout"} & swept) and config.dataset.conditional
        hides = config.guidance != 1 or config.label_dropout > 0 or may_hide
        return teacher.model_copy(
            update={key: getattr(config, key) for key in _SHARED_WITH_TEACHER - swept}
            | {
                "name": folder.name,
                "run_dir": str(folder),
                "tracking": tracking.model_copy(update={"tags": tags}),
                "label_dropout": _USUAL_DROPOUT if hides else teacher.label_dropout,
            }
        )


def _refuse_half_life(images: float) -> None:
    """${half_life:500000} was how 0.1.0 wrote one."""
    raise InputError("${half_life:...} is a key now", fix=f"ema.half_life_images={images} in the place of ema.decay")


OmegaConf.register_new_resolver("half_life", _refuse_half_life)


def parse(cfg: DictConfig) -> RunConfig:
    """The typed config of a composed one; what own pictures decide is as for usual ones, until somebody looks at them.

    Raises:
        InputError: a missing, unknown or ill-typed key, with its full name.
    """
    return _typed(plain_values(cfg), _UNSEEN, False)


def plain_values(cfg: DictConfig) -> Values:
    """A composed config as plain values. Raises InputError where one is missing, or stands for nothing."""
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
    return values


def _typed(
    values: Values, unseen: Facts, is_plain: bool, images: int | None = None, like: RunConfig | None = None
) -> RunConfig:
    """The typed config of plain values, each `auto` in them settled; see `plan.settle`.

    Args:
        unseen: what is taken for the images where they aren't known without a look.
        is_plain: whether no recipe is wanted.
    """
    dataset = registry.settings("dataset", values.get("dataset") or {})
    facts = dataset.known_facts() or unseen
    known = None if like is None else dump(like)
    settled = settle_plainly(values, facts) if is_plain else settle(values, facts, images, known)
    config = typed(RunConfig, settled, as_written=True)
    config = config.model_copy(update={"ema": config.ema.with_decay(config.batch_size)})
    _check_together(config)
    return config


def _check_together(config: RunConfig) -> None:
    """What no single key can tell; found now rather than after a teacher has trained."""
    config.dataset.check_for_training()
    config.objective.check_backbone(config.backbone)
    config.sampling.check_above(config.noise.sigma_min)
    check_noise(config.noise, registry.component(config.objective).levels)
    if config.eval_every:
        chosen_number(config)
    if config.guidance != 1 and not config.objective.needs_teacher():
        raise InputError(f"mode {config.mode} has no teacher to guide", f"guidance={config.guidance}", "1", "mode=cd")
    if config.teacher is not None and not config.needs_teacher():
        fix = "drop teacher=, or start from its weights with init=teacher"
        raise InputError(f"mode {config.mode} takes no teacher", config.teacher, "null", fix)
