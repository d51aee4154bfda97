"""The network that is trained: what it is told, what it takes over from a teacher or another run, its first weights."""

from collections.abc import Set

import torch

from ..core.errors import InputError
from ..core.registry import component
from ..core.rng import key
from ..core.settings import OF_RECIPE
from ..data.datasets.base import Dataset
from ..models.backbones.base import BackboneConfig
from ..models.checkpoints import find
from ..models.denoiser import LONGEST_NAME, Denoiser, DenoiserConfig, build_denoiser
from ..training.config import RunConfig

_MOST_NAMES = 2**15  # characters of all names together; a manifest has room for them, however they are written


def inherit_backbone(config: RunConfig, source: str | None, asked: Set[str]) -> RunConfig:
    """The config of a new run with the backbone of the network that it starts or learns from.

    Args:
        source: the run or checkpoint of that network; None where there is none.
        asked: the keys that the user has set.

    Raises:
        InputError: there is none, or the user asks for another backbone.
    """
    return config if source is None else _with_backbone(config, find.peek(source).backbone, source, asked)


def begun_backbone(config: RunConfig, stored: RunConfig, asked: Set[str]) -> RunConfig:
    """The config of a run that has begun, with the backbone that it took over then; its teacher isn't looked at."""
    if config.start is None and not config.needs_teacher():
        return config
    return _with_backbone(config, stored.backbone, str(config.folder), asked)


def _with_backbone(config: RunConfig, backbone: BackboneConfig, source: str, asked: Set[str]) -> RunConfig:
    """`config` with the network of `backbone`, trained by its own recipe. Raises InputError, see `inherit_backbone`."""
    backbone = backbone.with_recipe_of(config.backbone)
    networks = asked - {f"backbone.{key}" for key in config.backbone.marked(OF_RECIPE)}
    if backbone != config.backbone and any(key.split(".")[0] == "backbone" for key in networks):
        raise InputError(
            f"a student has the backbone that it starts from, and {source} has another than backbone=... asks for",
            fix="drop backbone=..., or give one of that backbone with teacher=... or init=...",
        )
    return config.model_copy(update={"backbone": backbone})


def student_config(
    config: RunConfig, dataset: Dataset, teacher: Denoiser | None, start: DenoiserConfig | None
) -> DenoiserConfig:
    """The student's settings. What the config leaves open is as in the network that it starts from or learns from.

    Args:
        start: the settings of the network whose weights it starts from, which for a resumed run are its own; None where
            they are random.

    Raises:
        InputError: they contradict that network's, or ask for a class that a data set or teacher doesn't have.
    """
    noise = config.noise
    model = start
    if start is None and teacher is not None:
        model = teacher.config
    if start is not None:
        _check_told(config, start)
    sigma_data, c_noise = noise.sigma_data, noise.c_noise
    if sigma_data is None:  # a student divides the work as its teacher did; from scratch, the data decide
        sigma_data = round(dataset.sigma_data(), 6) if model is None else model.sigma_data
    if c_noise is None:
        c_noise = "log_sigma" if model is None else model.c_noise
    objective = component(config.objective)
    return DenoiserConfig(
        kind=objective.kind,
        boundary=objective.boundary,
        c_noise=c_noise,
        image_size=dataset.image_size,
        image_channels=dataset.channels,
        num_classes=dataset.num_classes,
        class_names=_names(dataset),
        null_label=_null_label(config, dataset, start, teacher),
        sigma_data=sigma_data,
        sigma_min=noise.sigma_min,
        sigma_max=noise.sigma_max,
        rho=noise.rho,
        sampling=config.sampling,
    )


def _names(dataset: Dataset) -> list[str]:
    """The names of the classes, for a checkpoint to keep: all, or none where they are many or long."""
    names = dataset.class_names
    return names if sum(map(len, names)) <= _MOST_NAMES and max(map(len, names), default=0) <= LONGEST_NAME else []


def _check_told(config: RunConfig, start: DenoiserConfig) -> None:
    """Refuse to tell weights something else than what they were trained with: they would fit, and mean nothing."""
    for name in ("sigma_data", "c_noise"):
        wanted, known = getattr(config.noise, name), getattr(start, name)
        if wanted is not None and wanted != known:
            raise InputError(
                f"the weights of init={config.init} were trained with another noise.{name}",
                str(wanted),
                str(known),
                f"drop noise.{name}=, or set init=random",
            )


def _null_label(config: RunConfig, dataset: Dataset, start: DenoiserConfig | None, teacher: Denoiser | None) -> bool:
    """Whether the student has a null label: to train it, or because its first weights have one."""
    inherited = start is not None and start.null_label
    if not config.label_dropout:
        return inherited
    got = f"label_dropout={config.label_dropout}"
    if not dataset.num_classes:
        raise InputError("label_dropout needs classes", got, "0", "set dataset.conditional=true")
    asked = teacher if config.objective.needs_teacher() else None
    if (start is not None and not inherited) or (asked is not None and not asked.config.null_label):
        what = "label_dropout needs a teacher, and first weights, that were trained with it too"
        raise InputError(what, got, "0 for these", "train them with label_dropout=0.1, or drop label_dropout=")
    return True


def random_student(config: RunConfig, settings: DenoiserConfig, device: torch.device) -> Denoiser:
    """The student with the random weights of the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "weights"))
        return build_denoiser(settings, config.backbone).to(device)


def stand_in_teacher(config: RunConfig, dataset: Dataset, device: torch.device) -> Denoiser:
    """A diffusion model that has learnt nothing, of the network that a teacher of this run would have."""
    teacher = DenoiserConfig(
        kind="diffusion",
        boundary="zero",
        image_size=dataset.image_size,
        image_channels=dataset.channels,
        num_classes=dataset.num_classes,
        null_label=config.guidance != 1,
        sigma_data=0.5,
        sigma_min=config.noise.sigma_min,
        sigma_max=config.noise.sigma_max,
    )
    return random_student(config, teacher, device).requires_grad_(False).eval()
