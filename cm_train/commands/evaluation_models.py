"""The models that cm-eval measures: checkpoints, each by a name of its own."""

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from ..core.memory import shortage_explained
from ..core.run_layout import run_of
from ..evaluation.drawing import Drawing
from ..models.checkpoints import find
from ..models.checkpoints import read as checkpoint
from ..models.checkpoints.load import load_checkpoint
from ..models.checkpoints.manifest import Manifest
from ..models.checkpoints.weights import sha256_of_weights
from ..sampling.guidance import guided
from ..sampling.labels import class_numbers
from .device import device_for
from .evaluation_config import EvalConfig


@dataclass(frozen=True)
class Model:
    """A checkpoint.

    Attributes:
        path: its folder.
        run: as the user called it, or its run's folder.
        label: for the folder of its numbers.
    """

    path: Path
    run: str
    label: str
    manifest: Manifest

    def sha256(self, weights: str) -> str:
        """Of the weights of that name."""
        return sha256_of_weights(self.manifest, weights)


def models_of(config: EvalConfig) -> list[Model]:
    """What `ckpt` and `checkpoints` mean. Raises InputError where there is no checkpoint."""
    models = []
    for given in config.ckpt:
        folder, manifest = find.resolve(given)
        run = run_of(folder)
        if config.checkpoints == "newest":
            models.append(_model(folder, given, manifest, config))
        elif run == folder:
            raise InputError("checkpoints=all is of a run's folder", given, fix="checkpoints=newest")
        else:
            found = [find.resolve(each) for each in reversed(checkpoint.folders(run))]
            models += [_model(each, str(run), known, config) for each, known in found]
    labels = [model.label for model in models]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise InputError("two of these are called alike", twice, fix="measure them in two commands")
    return models


def load(config: EvalConfig, model: Model) -> Drawing:
    """The model in memory, and how it is sampled. Raises InputError, or OutOfMemory."""
    device = device_for(config.device)
    with shortage_explained("while the checkpoint was being loaded", "device=cpu, or less beside it on this machine"):
        denoiser = load_checkpoint(model.path, config.weights, device)[2]
    labels: list[int] | None = None
    if config.labels is not None:
        numbers = class_numbers(config.labels, 1, denoiser.config)
        labels = [numbers] if isinstance(numbers, int) else numbers
    return Drawing.of(
        guided(denoiser, config.guidance),
        config.sampler,
        config.steps,
        config.sigmas,
        labels,
        config.precision,
        config.batch_size,
        config.seed,
    )


def _model(folder: Path, given: str, manifest: Manifest, config: EvalConfig) -> Model:
    name = run_of(folder).resolve().name
    levels = "" if config.steps is None else f"-{config.steps}-step{'s' * (config.steps > 1)}"
    at = "" if config.sigmas is None else "-at-" + "-".join(f"{sigma:g}" for sigma in config.sigmas[:4])
    weights = "" if config.weights == "ema" else f"-{config.weights}"
    return Model(folder, given, f"{name}-step-{manifest.step}{levels}{at}{weights}", manifest)
