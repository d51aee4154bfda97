"""Labels of image files: by the folders that they are in, or by the list that StyleGAN's and EDM's tools write."""

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import patiently
from .image_files import LABELS, ImageFiles

# Folders by which people divide a data set before a training, and not by what is in the pictures.
_PART = re.compile(r"(^|.*[_ -])(train|training|val|valid|validation|dev|test|testing|eval)([_ -]?[0-9]*|[AB])")
_MOST_CLASSES = 1_000_000
_FOLDERS = "dataset.class_level=1 takes the folders' names"


def label(files: ImageFiles, names: list[str], root: str, level: int | None) -> tuple[list[str], Tensor]:
    """Class names, and the class of each of `names`; int64 [N].

    Args:
        files: where the images come from; a `dataset.json` beside them wins over folders.
        level: which folder of each path is the class, 1 the topmost; None: dataset.json, or else the first level of
            folders that divides the images.

    Raises:
        InputError: an image has no class, there is one class only, or it can't be told what the classes are.
    """
    if level is None and files.label_files:
        listed = _listed(files, names, root)
        if listed is not None:
            return _by_list(listed, names, root)
    depth = dividing_level(names) if level is None else level - 1
    classes, labels = by_folder(names, root, depth + 1)
    if len(classes) < 2:
        raise InputError(
            f"all images of {root} are in one class", classes[0], "two or more", "drop dataset.class_level="
        )
    if level is None and are_parts(classes):
        above = "/".join([root.rstrip("/"), *names[0].split("/")[:depth]])
        raise InputError(
            f"{' and '.join(classes)} look like parts of a data set, not like its classes",
            fix=f"{_root(f'{above}/{classes[0]}')} for one part, dataset.class_level={depth + 2} for the folders "
            f"below, or dataset.class_level={depth + 1} if they are the classes",
        )
    return classes, labels


def by_folder(
    names: list[str], root: str, level: int, order: Callable[[str], Any] | None = None
) -> tuple[list[str], Tensor]:
    """Class names, and the class of each of `names`, which is its folder at `level`, from 1.

    Args:
        order: the key by which classes are sorted; None: numbers in them count as numbers.

    Raises:
        InputError: an image lies above that level.
    """
    paths = [name.split("/") for name in names]
    stray = [name for name, path in zip(names, paths, strict=True) if len(path) < level + 1]
    if stray:
        raise InputError(
            "dataset.conditional=true needs every image in a folder of its class",
            f"{len(stray)} of {len(names)} images outside of any, e.g. {stray[0]!r} in {root}",
            f"folders of classes at level {level} of each path (dataset.class_level)",
        )
    classes = sorted({path[level - 1] for path in paths}, key=order or in_natural_order)
    number = {name: i for i, name in enumerate(classes)}
    # Names of bytes that are no letters can't be kept as they are.
    names = [name.encode("utf-8", "backslashreplace").decode() for name in classes]
    return names, torch.tensor([number[path[level - 1]] for path in paths])


def dividing_level(names: list[str]) -> int:
    """How many folders all of `names` have in common, from the top."""
    paths, depth = [name.split("/") for name in names], 0
    while len({path[depth] for path in paths}) == 1 and all(len(path) > depth + 1 for path in paths):
        depth += 1
    return depth


def folders(names: list[str]) -> Counter[str]:
    """The folders that divide the images, and how many are in each; none where some images are outside of any."""
    paths, depth = [name.split("/") for name in names], dividing_level(names)
    return Counter() if any(len(path) < depth + 2 for path in paths) else Counter(path[depth] for path in paths)


def are_parts(names: list[str]) -> bool:
    """Whether folders of these names divide a data set for training and testing."""
    parts = sum(_PART.fullmatch(name) is not None or _PART.fullmatch(name.lower()) is not None for name in names)
    return parts > 1 and 2 * parts > len(names)


def in_natural_order(name: str) -> list[tuple[int, str]]:
    """A key by which 2 comes before 10."""
    parts = re.split(r"([0-9]+)", name)
    key = [(0, part) if i % 2 == 0 else (len(part.lstrip("0")), part.lstrip("0")) for i, part in enumerate(parts)]
    return [*key, (0, name)]  # 1 and 01 are two names


def _root(path: str) -> str:
    return shlex.quote(f"dataset.root={path}")


def _listed(files: ImageFiles, names: list[str], root: str) -> dict[str, Any] | None:
    """What dataset.json says of each path; None where there is one that is about something else.

    Raises:
        InputError: it can't be read, or is about a part of the images only.
    """
    name = min(files.label_files, key=lambda name: (name.count("/"), name))
    folder = name[: -len(LABELS)]
    try:
        content = json.loads(patiently(lambda: files.read(name)))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name} in {root} can't be read: {error}", fix=f"repair it; {_FOLDERS}") from None
    if isinstance(content, dict) and "labels" not in content:
        return None
    rows = content["labels"] if isinstance(content, dict) else content
    if rows is None or rows == []:
        raise InputError(f"{name} in {root} has no labels", fix=f"drop dataset.conditional=true; {_FOLDERS}")
    if not isinstance(rows, list):
        raise InputError(f"the labels of {name} in {root} are not pairs of a file and a label", fix=_FOLDERS)
    if not all(path.startswith(folder) for path in names):
        fix = f"{_root(os.path.join(root, folder.rstrip('/')))} for that part; {_FOLDERS}"
        raise InputError(f"{name} in {root} is about a part of the images only", fix=fix)
    try:
        return {folder + str(path).replace("\\", "/"): value for path, value in rows}
    except (TypeError, ValueError):
        raise InputError(f"the labels of {name} in {root} are not pairs of a file and a label", fix=_FOLDERS) from None


def _by_list(listed: dict[str, Any], names: list[str], root: str) -> tuple[list[str], Tensor]:
    missing = [name for name in names if name not in listed]
    if missing:
        got = f"{len(missing)} of {len(names)}, e.g. {missing[0]!r}"
        raise InputError(f"{LABELS} in {root} has no label for some images", got, fix=f"repair it; {_FOLDERS}")
    labels = [_number(listed[name], name) for name in names]
    if len(set(labels)) == 1:
        raise InputError(f"all images of {root} are in one class", fix="drop dataset.conditional=true")
    return [str(i) for i in range(max(labels) + 1)], torch.tensor(labels)


def _number(value: Any, name: str) -> int:
    """The class that one label means: a number, or a list of a single 1 among 0."""
    if isinstance(value, list) and value.count(1) == 1 and value.count(0) == len(value) - 1:
        value = value.index(1)
    if type(value) is not int or not 0 <= value < _MOST_CLASSES:
        raise InputError(f"{LABELS}: the label of {name!r} is no class", str(value)[:80], f"0 to {_MOST_CLASSES - 1}")
    return value
