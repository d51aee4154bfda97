"""What a data set is, in words and numbers: for a person to see before anything is trained on it."""

import hashlib
from collections import Counter
from typing import Any

import torch

from ..core.progress import progress
from ..core.signals import heed
from .datasets.base import Dataset, listed
from .datasets.image_folder import ImageFolder
from .open_files import open_files
from .survey import survey

_TOGETHER = 512  # images that are looked at in one go
_FEW = 4  # sizes or modes that are told apart


def describe(dataset: Dataset) -> dict[str, Any]:
    """Numbers of a set that is loaded: how many images, of which classes, sizes and modes, and how often twice."""
    found: dict[str, Any] = {
        "images": len(dataset),
        "held_out": dataset.num_held_out,
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "classes": _classes(dataset),
        "sigma_data": round(dataset.sigma_data(), 4),
        "same_as_another": None if dataset.lazy else _num_doubled(dataset),
        "notes": list(dataset.notes),
    }
    if isinstance(dataset, ImageFolder):
        files = open_files(dataset.config.root)
        seen = survey(files, dataset.file_names)
        files.close()
        found |= {
            "looked_at": seen.num,
            "sizes": {f"{w}x{h}": num for (w, h), num in Counter(seen.sides).most_common()},
            "modes": dict(seen.modes.most_common()),
            "cropped": sum(w != h for w, h in seen.sides),
            "enlarged": sum(min(side) < dataset.image_size for side in seen.sides),
            "unreadable": len(seen.unreadable),
        }
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """What `describe` has found, in lines for a person."""
    size = f"{found['image_size']}x{found['image_size']} {'grey' if found['channels'] == 1 else 'colour'}"
    out = [f"{found['images']:,} images, {size}, sigma_data {found['sigma_data']:g}"]
    if classes := found["classes"]:
        some = [f"{name} ({num:,})" for name, num in classes.items()]
        out.append(f"{len(classes):,} classes: {listed(some)}")
    if "sizes" in found:
        of = "" if found["looked_at"] == found["images"] else f" of the {found['looked_at']:,} looked at"
        out.append(f"sizes{of}: {_some(found['sizes'])}; modes: {_some(found['modes'])}")
        out.append(f"cropped to a square: {found['cropped']:,}; enlarged: {found['enlarged']:,}")
    if found["same_as_another"]:
        out.append(f"{found['same_as_another']:,} are the same as another one")
    return out + list(found["notes"])


def _some(counts: dict[str, int]) -> str:
    shown = [f"{name} ({num:,})" for name, num in [*counts.items()][:_FEW]]
    more = len(counts) - len(shown)
    return ", ".join([*shown, f"and {more:,} more"] if more else shown)


def _classes(dataset: Dataset) -> dict[str, int]:
    """How many images there are of each class, where that is known."""
    labels = dataset.all_labels()
    if labels is None:
        return {}
    counts = torch.bincount(labels.cpu(), minlength=dataset.num_classes).tolist()
    return dict(zip(dataset.class_names, counts, strict=True))


def _num_doubled(dataset: Dataset) -> int:
    seen = set()
    with progress(len(dataset), "comparing images") as bar:
        for index in torch.arange(len(dataset)).split(_TOGETHER):
            heed()
            images, _ = dataset.gather(index)
            seen |= {hashlib.sha256(image.numpy().data).digest() for image in images.cpu()}
            bar.advance(len(index))
    return len(dataset) - len(seen)
