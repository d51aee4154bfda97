"""What a person should hear of a set of image files before anything is trained on it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import image_labels
from .datasets.base import listed
from .image_files import ImageFiles


def unread(files: ImageFiles) -> str:
    """Which pictures are not read, by their endings; "" where all are."""
    return ", ".join(f"{len(n)} {ending} (as {min(n)!r})" for ending, n in sorted(files.unread.items()))


def notes(
    files: ImageFiles, names: list[str], root: str, class_names: list[str], labels: Tensor | None
) -> Iterator[str]:
    """Sentences about what is not used and what there may be instead.

    Args:
        names: of `files`, those that are.
        labels: None where none are wanted.
    """
    if files.unread:
        yield f"not read are {unread(files)}; PNG, JPEG and WebP are, among others"
    if files.doubled:
        yield f"members whose names come again are left out, the last is taken: {files.doubled}"
    if labels is not None:
        counts = torch.bincount(labels, minlength=len(class_names))
        empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
        if empty:
            yield f"no image is of {'class' if len(empty) == 1 else 'classes'} {listed(empty)}"
        return
    if files.label_files:
        where = min(files.label_files, key=len)
        yield f"its {where} is not used; dataset.conditional=true takes the labels that it has, if any"
        return
    folders = image_labels.folders(names)
    counted = [f"{name} ({folders[name]:,})" for name in sorted(folders, key=image_labels.in_natural_order)]
    if image_labels.are_parts(list(folders)):
        yield f"it has all of {listed(counted)}; dataset.root={root}/... takes one of them"
    elif counted:
        yield f"its folders {listed(counted)} give no labels; dataset.conditional=true makes them classes"
