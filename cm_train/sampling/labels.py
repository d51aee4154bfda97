"""The classes that images are wanted of, by name or number."""

import difflib
import itertools
from collections.abc import Mapping, Sequence

from ..core.errors import InputError
from ..core.settings import excerpt
from ..models.denoiser import DenoiserConfig

_SHOWN = 5  # classes, in words


def class_numbers(asked: int | str | Sequence[int | str], count: int, config: DenoiserConfig) -> int | list[int]:
    """The classes that a user wants `count` images of, each by its name or number, as `generate(labels=)` takes them.

    A name wins: folders called 1, 2, ..., 10 are classes in another order.

    Raises:
        InputError: the checkpoint has no such class, or it is not one label an image.
    """
    known = {name: number for number, name in enumerate(config.class_names)}
    if isinstance(asked, int | str):
        numbers: int | list[int] = _class_number(asked, known, config.num_classes)
    else:
        numbers = [_class_number(label, known, config.num_classes) for label in asked]
    one_an_image(numbers, count, config.num_classes)
    return numbers


def _class_number(label: int | str, known: Mapping[str, int], num_classes: int) -> int:
    if str(label) in known:
        return known[str(label)]
    if isinstance(label, int):
        return label
    if not num_classes:
        raise InputError("this checkpoint has no classes", f"labels={excerpt(label)}", fix="drop labels=")
    if not known:
        raise InputError("this checkpoint knows its classes by number alone", excerpt(label), f"0 to {num_classes - 1}")
    names = excerpt(", ".join(itertools.islice(known, 100)))
    near = difflib.get_close_matches(label, known, 1, cutoff=0.5)
    fix = f"labels={near[0]}" if near else None
    raise InputError("no such class", excerpt(label), f"{names}, or 0 to {num_classes - 1}", fix)


def one_an_image(labels: Sequence[int] | int, count: int, num_classes: int) -> list[int]:
    """A label for each of `count` images, where one for all may be given. Raises InputError as `class_numbers` does."""
    classes = [labels] * count if isinstance(labels, int) else list(labels)
    if not num_classes:
        raise InputError("this checkpoint has no classes", f"labels={excerpt(labels)}", fix="drop labels=")
    if len(classes) != count:
        raise InputError("one label an image is needed", f"{len(classes)} labels for {count} images")
    if not all(0 <= c < num_classes for c in classes):
        raise InputError("no such class", excerpt(labels), f"0 to {num_classes - 1}")
    return classes


def in_words(labels: int | Sequence[int] | None, names: Sequence[str]) -> str:
    """Names and numbers of the classes that were asked for, the first ones of many; "" where they have no names."""
    if labels is None or not names:
        return ""
    numbers = list(dict.fromkeys([labels] if isinstance(labels, int) else labels))
    more = f", ... ({len(numbers)} in all)" if len(numbers) > _SHOWN else ""
    return ", ".join(f"{names[n]} ({n})" for n in numbers[:_SHOWN]) + more
