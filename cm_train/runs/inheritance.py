"""The network that is trained: what it is told, what it takes over from a teacher or another run, its first weights."""

import torch

from ..core.errors import InputError
from ..core.registry import find
from ..core.rng import key
from ..data.datasets.base import Dataset
from ..models.checkpoints import read as checkpoint
from ..models.checkpoints.weights import open_weights
from ..models.denoiser import LONGEST_NAME, Denoiser, DenoiserConfig, build_denoiser
from ..training.config import RunConfig

_MOST_NAMES = 2**15  # characters of all names together; a manifest has room for them, however they are written


def student_config(
    config: RunConfig, dataset: Dataset, teacher: Denoiser | None, resumed: DenoiserConfig | None = None
) -> DenoiserConfig:
    """The student's settings. What the config leaves open is as in the network that it starts from or learns from.

    Args:
        resumed: what they were when the run was saved; it then starts from itself.

    Raises:
        InputError: they contradict that network's, or ask for a class that a data set or teacher doesn't have.
    """
    noise, start = config.noise, _start(config, teacher) if resumed is None else resumed
    model = start if start is not None else None if teacher is None else teacher.config
    if start is not None:
        _check_told(config, start)
    sigma_data, c_noise = noise.sigma_data, noise.c_noise
    if sigma_data is None:  # a student divides the work as its teacher did; from scratch, the data decide
        sigma_data = round(dataset.sigma_data(), 6) if model is None else model.sigma_data
    if c_noise is None:
        c_noise = "log_sigma" if model is None else model.c_noise
    objective = find("objective", config.objective["name"])
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


def _start(config: RunConfig, teacher: Denoiser | None) -> DenoiserConfig | None:
    """The settings of the network whose weights the student starts from; None where they are random."""
    if config.init == "random":
        return None
    if config.init == "teacher":
        assert teacher is not None, "the command checks this"
        return teacher.config
    return checkpoint.resolve(config.init)[1].denoiser


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
    asked = teacher if config.loss_needs_teacher() else None
    if (start is not None and not inherited) or (asked is not None and not asked.config.null_label):
        what = "label_dropout needs a teacher, and first weights, that were trained with it too"
        raise InputError(what, got, "0 for these", "train them with label_dropout=0.1, or drop label_dropout=")
    return True


def build_student(config: RunConfig, settings: DenoiserConfig, device: torch.device) -> Denoiser:
    """The student with the random weights of the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "weights"))
        return build_denoiser(settings, config.backbone).to(device)


def initialise(denoiser: Denoiser, init: str, teacher: Denoiser | None) -> None:
    """Give the student its first weights, as `init` says. Raises InputError where they don't fit."""
    if init == "teacher":
        assert teacher is not None, "the command checks this"
        denoiser.load_state_dict(teacher.state_dict())
    elif init != "random":
        checkpoint.read(init, lambda folder, manifest: open_weights(folder, manifest, "ema").load_into(denoiser))
