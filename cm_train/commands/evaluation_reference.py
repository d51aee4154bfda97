"""What cm-eval compares with: the images that a run was trained on, or what the user names."""

import hashlib
from contextlib import suppress

import torch

from ..core import registry
from ..core.errors import InputError
from ..core.progress import progress
from ..core.run_layout import run_of
from ..core.signals import heed
from ..core.terminal import say
from ..data.datasets.base import Dataset, DatasetConfig
from ..evaluation.comparison import Comparison, chosen_features, compare_with
from ..evaluation.sources import Statistics, loaded, real_images, samples_at, with_classes
from ..models.checkpoints.manifest import Manifest
from ..runs.read_back import read_back
from .device import device_for
from .evaluation_config import EvalConfig
from .evaluation_models import Model

_READ = 256  # images in memory at once


def compare(config: EvalConfig, models: list[Model]) -> Comparison:
    """The real images for these models, ready. Raises InputError where they have none in common."""
    first = models[0].manifest.denoiser
    size = first.image_size, first.image_channels
    for model in models[1:]:
        d = model.manifest.denoiser
        if (d.image_size, d.image_channels) != size:
            got = f"{models[0].label}: {size}, {model.label}: {(d.image_size, d.image_channels)}"
            raise InputError("these models make images of different sizes", got, "one size and number of channels")
    held_out = None if config.held_out is None else real_images(config.held_out, *size)
    own = _own_images_at(config.reference, models) if config.reference is not None else None
    if config.reference is not None and own is None:
        reference = real_images(config.reference, *size)
        _check_same_shape(reference, size, config.reference)
        return _compared(config, reference, config.reference, _pictures(held_out, config), size)
    for model in models[1:]:
        if model.manifest.provenance.get("dataset") != models[0].manifest.provenance.get("dataset"):
            what = f"{models[0].label} and {model.label} were trained on different images, or labels"
            raise InputError(what, fix="reference=... for both")
    data, images = own or _data_of_run(models[0])
    if held_out is None and (held := data.held_out()) is not None:
        held_out = loaded(held)
    what = f"{data.place or data.name}, the training images"
    return _compared(config, images, what, _pictures(held_out, config), size)


def compare_samples(config: EvalConfig, path: str) -> tuple[Dataset, str, Comparison]:
    """Images that are there, the sha256 of their pixels, and the real ones to compare them with."""
    if config.reference is None:
        raise InputError("samples need something to be compared with", fix="reference=a data set, folder, zip or .npz")
    samples = samples_at(path)
    size = samples.image_size, samples.channels
    reference = real_images(config.reference, *size)
    _check_same_shape(reference, size, config.reference)
    held_out = None if config.held_out is None else real_images(config.held_out, *size)
    comparison = _compared(config, reference, config.reference, _pictures(held_out, config), size)
    return samples, _sha256_of_pixels(samples), comparison


def _compared(
    config: EvalConfig, reference: Dataset | Statistics, what: str, held_out: Dataset | None, size: tuple[int, int]
) -> Comparison:
    side, channels = size
    has_classes = isinstance(reference, Dataset) and reference.num_classes > 0
    features, shape = chosen_features(config.features, channels, has_classes), (channels, side, side)
    return compare_with(
        reference, what, features, [*config.metrics.values()], shape, held_out, device_for(config.device)
    )


def _own_images_at(text: str, models: list[Model]) -> tuple[DatasetConfig, Dataset] | None:
    """What these models were trained on where it lies at `text` now, decoded as it was and without what is held out.

    Returns:
        None where `text` is something else.
    """
    run, recorded = run_of(models[0].path), models[0].manifest.provenance.get("dataset")
    if run == models[0].path or recorded is None or text in registry.names("dataset") or text.endswith(".npz"):
        return None
    with suppress(InputError):
        data = read_back(run).dataset
        if data.place is None:
            return None
        data = data.at(text)
        images = loaded(data)
        if images.was_known_as(recorded) and all(m.manifest.provenance.get("dataset") == recorded for m in models):
            return data, images
    return None


def _data_of_run(model: Model) -> tuple[DatasetConfig, Dataset]:
    """What a checkpoint's run was trained on."""
    run = run_of(model.path)
    if run == model.path:
        raise InputError(f"{model.path} lies in no run, which would know its images", fix="reference=...")
    data = read_back(run).dataset
    try:
        images = loaded(data)
    except InputError as error:
        raise InputError(f"the images of {run} can't be had: {error}", fix="reference=... where they are") from None
    _note_changes(images, model.manifest, run.name)
    return (labelled := with_classes(data)), images if labelled == data else loaded(labelled)


def _note_changes(dataset: Dataset, manifest: Manifest, run: str) -> None:
    recorded = manifest.provenance.get("dataset")
    if recorded is not None and not dataset.was_known_as(recorded):
        say(f"note: the images have changed since {run} was trained; these are not the ones that it has seen")


def _pictures(held_out: Dataset | Statistics | None, config: EvalConfig) -> Dataset | None:
    if isinstance(held_out, Statistics):
        raise InputError("held_out are pictures, not statistics", config.held_out)
    return held_out


def _check_same_shape(reference: Dataset | Statistics, size: tuple[int, int], text: str) -> None:
    if isinstance(reference, Dataset) and (reference.image_size, reference.channels) != size:
        got = f"{reference.image_size}x{reference.image_size}, {reference.channels} channels"
        wanted = f"{size[0]}x{size[0]}, {size[1]} channels"
        raise InputError(f"reference {text} has other images", got, wanted, "a folder of pictures, which are scaled")


def _sha256_of_pixels(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    with progress(len(dataset), "reading samples") as bar:
        for some in torch.arange(len(dataset)).split(_READ):
            heed()
            digest.update(dataset.gather(some)[0].cpu().contiguous().numpy().data)
            bar.advance(len(some))
    return digest.hexdigest()
