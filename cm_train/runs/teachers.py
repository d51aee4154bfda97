"""The teacher that a student is given, or that is trained first, and the backbone that a student inherits."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from ..core.signals import StopFlag

_OF_THE_RECIPE = {"dropout", "dropout_max_size"}  # of a backbone; all else is its size, which a student inherits
# How a set is used and where it lies, not what is in it: whether that is the same, fingerprints tell.
_NOT_DATA = {"root", "download", "hflip", "memory_gb", "skip_broken", "max_megapixels"}


def inherit(config: Any, cfg: DictConfig, train: Callable[[Any], bool], stop: StopFlag, swept: frozenset[str]) -> Any:
    """A new run's config with its teacher found (trained first where it is missing), and that one's backbone taken.

    A run that starts from another's weights (`init=`) takes the backbone from there.

    Args:
        train: trains a run of the given config; False where it was stopped early.
        swept: keys in which the jobs of a sweep differ, so that they can't decide anything about their teacher.

    Returns:
        None where the teacher's training was stopped.
    """
    from ..core.errors import InputError
    from ..models.checkpoints import read as checkpoint

    if config.needs_teacher() and config.teacher is None:
        home = config.usual_teacher
        if home.resolve() == config.folder.resolve():
            raise InputError(f"{home} can't be its own teacher", fix="set teacher=..., or init=random")
        if not _teacher_ready(config, cfg, home, train, stop, swept):
            return None
        config = config.model_copy(update={"teacher": str(home)})
    source = config.start or config.teacher
    return config if source is None else _with_backbone(config, checkpoint.resolve(source)[1].backbone, source)


def as_it_began(config: Any, stored: Any) -> Any:
    """The config of a run that has begun, with the backbone that it took over then; its teacher isn't looked at."""
    if config.start is None and not config.needs_teacher():
        return config
    return _with_backbone(config, stored.backbone, str(config.folder))


def find_again(config: Any, stored: Any, known: str | None) -> Any:
    """The config of a run that has begun and goes on, with the teacher that it began with, wherever that is now.

    Args:
        stored: its config as it was.
        known: what its checkpoints know the teacher by; see `checkpoint.averaged_sha256`.

    Raises:
        InputError: the teacher is not there, and the loss needs it or `teacher=` names it.
    """
    from ..core.errors import InputError
    from ..core.terminal import say
    from ..models.checkpoints import read as checkpoint

    if not config.needs_teacher() or known is None:
        return config.model_copy(update={"teacher": config.teacher or stored.teacher})
    usual = [str(config.usual_teacher), *filter(None, [stored.teacher])]
    places = list(dict.fromkeys(usual)) if config.teacher is None else [config.teacher]
    damaged = ""
    for place in places:
        try:
            checkpoint.resolve_known(place, known)
            return config.model_copy(update={"teacher": place})
        except checkpoint.NotThere:
            pass
        except checkpoint.DamagedCheckpoint as error:
            damaged = damaged or f": {error}"
    gone = f"the teacher that {config.folder} began with is not in {' nor in '.join(places)}{damaged}"
    if config.loss_needs_teacher() or config.teacher is not None:
        fix = "bring it back, or name the place where it is now with teacher=..."
        raise InputError(gone, allowed=f"averaged weights with the sha256 {known[:16]}...", fix=fix)
    say(f"note: {gone}; it gave the first weights, and how well the student agrees with it is no longer measured")
    return config


def _with_backbone(config: Any, backbone: Mapping[str, Any], source: str) -> Any:
    """`config` with the backbone of the network that is in `source`. Raises InputError where another is asked for."""
    from ..core.errors import InputError
    from ..core.registry import settings

    if config.backbone["name"] == backbone["name"]:
        backbone = {**backbone, **_own_recipe(config.backbone)}
    asked = {o.lstrip("+").split("=")[0] for o in HydraConfig.get().overrides.task}
    asked -= {f"backbone.{key}" for key in _OF_THE_RECIPE}
    differs = settings("backbone", backbone) != settings("backbone", config.backbone)
    if differs and any(key.split(".")[0] == "backbone" for key in asked):
        raise InputError(
            f"a student has the backbone that it starts from, and {source} has another than backbone=... asks for",
            fix="drop backbone=..., or give one of that backbone with teacher=... or init=...",
        )
    return config.model_copy(update={"backbone": backbone})


def _own_recipe(backbone: Mapping[Any, Any]) -> dict[str, Any]:
    """What a backbone's settings say of training rather than of the network."""
    return {key: backbone[key] for key in _OF_THE_RECIPE if key in backbone}


def _teacher_ready(
    config: Any, cfg: DictConfig, home: Path, train: Callable[[Any], bool], stop: StopFlag, swept: frozenset[str]
) -> bool:
    """Make sure of a finished teacher in `home`, of this run's data; False where its training was stopped."""
    from ..core.errors import TrainingFailed
    from ..core.terminal import say
    from ..models.checkpoints import read as checkpoint
    from .config import read_back
    from .lock import FolderInUse

    said = False
    while not _is_finished(newest := checkpoint.newest_manifest(home), home):
        # One that was begun goes on with its own settings, whatever they were.
        teacher = _teacher_config(config, cfg, home, swept) if newest is None else read_back(home)
        _check_data(config, teacher.dataset, home)
        teacher = teacher.model_copy(update={"dataset": {**teacher.dataset, **_root(config.dataset)}})
        # Where its curves go is this command's to say: a stored tracker must not put private pictures online unasked.
        tracking = config.tracking.model_copy(update={"tags": teacher.tracking.tags})
        teacher = teacher.model_copy(update={"name": home.name, "run_dir": str(home), "tracking": tracking})
        try:
            if not said:
                say(f"no finished teacher in {home}: training it first (teacher=... names another)")
            with _not_of_the_agent():
                if not train(teacher):
                    return False
        except FolderInUse as error:  # most likely another job of this sweep, which needs the same teacher
            if not said:
                say(f"waiting for the teacher: {str(error).split('; ')[0]}")
            if stop():
                return False
            time.sleep(1)
        except TrainingFailed as error:
            raise TrainingFailed(f"the teacher in {home}: {error}") from None
        said = True
    _check_data(config, read_back(home).dataset, home)
    return True


def _is_finished(newest: Any, home: Path) -> bool:
    """Whether the run in `home` is as long as it shall be; its `steps` may have been lowered to what it had."""
    from .config import read_back

    return newest is not None and (newest.finished or newest.step >= read_back(home).steps)


@contextmanager
def _not_of_the_agent() -> Iterator[None]:
    """While a teacher trains: of the runs of this command, wandb's variables and an agent of its mean the student."""
    from ..training.tracking import OF_ONE_RUN

    hidden = {key: os.environ.pop(key) for key in OF_ONE_RUN if key in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _check_data(config: Any, data: dict[str, Any], home: Path) -> None:
    from ..core.errors import InputError
    from ..core.registry import settings

    mine, theirs = (
        {"name": d["name"], **{k: v for k, v in settings("dataset", d).model_dump().items() if k not in _NOT_DATA}}
        for d in (config.dataset, data)
    )
    if mine != theirs:
        raise InputError(
            f"the teacher in {home} was trained on other data: {data}",
            fix="set teacher=..., or run_dir=... in a folder of its own",
        )


def _root(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Where a data set lies now, where it is one that lies somewhere."""
    return {"root": dataset["root"]} if "root" in dataset else {}


def _teacher_config(config: Any, cfg: DictConfig, home: Path, swept: frozenset[str]) -> Any:
    """mode=edm with its own recipe for the same data, backbone, machine settings, seed and tracking."""
    from .config import parse

    choice = HydraConfig.get().runtime.choices["dataset"]
    teacher = compose("train", overrides=["mode=edm", f"dataset={choice}"])
    backbone = OmegaConf.to_container(cfg.backbone)
    assert isinstance(backbone, dict)
    backbone |= {key: value for key, value in _own_recipe(teacher.backbone).items() if key in backbone}
    with open_dict(teacher):
        teacher.backbone = backbone
        for key in ("dataset", "devices", "precision", "compile", "deterministic", "seed", "tracking"):
            if key == "dataset" or key not in swept:  # else whichever job came first would have a say
                teacher[key] = cfg[key]
        teacher.tracking.tags = [tag for tag in cfg.tracking.tags if tag.split("=")[0] not in swept]
        may_hide = bool({"guidance", "label_dropout"} & swept) and cfg.dataset.conditional
        if cfg.guidance != 1 or cfg.label_dropout or may_hide:
            teacher.label_dropout = 0.1  # or it could not be guided, nor say what no class is
        teacher.name, teacher.run_dir = home.name, str(home)
    return parse(teacher)
