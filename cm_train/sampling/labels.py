"""The classes that images are wanted of, by name or number."""

import difflib
import unicodedata
from collections.abc import Sequence

from ..core.errors import InputError
from ..core.rng import PerImageNoise
from ..core.settings import excerpt
from ..models.denoiser import DenoiserConfig

_SHOWN = 5  # classes, in words
_LISTED = 20  # of those that there are
_LONGEST_LISTED = 40  # characters


def class_numbers(asked: int | str | Sequence[int | str], count: int, config: DenoiserConfig) -> int | list[int]:
    """The classes that a user wants `count` images of, each by its name or number: one for all, or several in turn.

    A name wins: folders called 1, 2, ..., 10 are classes in another order.

    Raises:
        InputError: the checkpoint has no such class, or there are more of them than images, or none.
    """
    if isinstance(asked, int | str):
        numbers: int | list[int] = class_number(asked, config)
    else:
        known = {label: class_number(label, config) for label in dict.fromkeys(asked)}
        numbers = [known[label] for label in asked]
        count = max(1, min(count, len(numbers)))
    one_an_image(numbers, count, config.num_classes)
    return numbers


def class_number(label: int | str, config: DenoiserConfig) -> int:
    """The class of that name, else of that number. Raises InputError for a name that no class has."""
    known = {name: number for number, name in enumerate(config.class_names)}
    if str(label) in known:
        return known[str(label)]
    if isinstance(label, int):
        return label
    if not config.num_classes:
        raise InputError("this checkpoint has no classes", f"labels={excerpt(label)}", fix="drop labels=")
    numbers = f"0 to {config.num_classes - 1}"
    if not known:
        raise InputError("this checkpoint knows its classes by number alone", excerpt(label), numbers)
    near = difflib.get_close_matches(label, known, 1, cutoff=0.5)
    fix = f"labels={near[0]}" if near else None
    raise InputError("no such class", excerpt(label), f"{_listed(config.class_names)}, or {numbers}", fix)


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


def drawn_labels(seeds: Sequence[int], num_classes: int) -> list[int]:
    """The classes that images of these seeds are of where nobody says which; each depends on its own seed alone."""
    return PerImageNoise(seeds).randint("label", num_classes).tolist() if seeds else []


def captions_of(labels: Sequence[int], names: Sequence[str]) -> list[str]:
    """What to write under images of these classes: their names; numbers where names are unknown or not to be written.

    The font that Pillow brings has the letters of ASCII: others lose their accents, or make the name a number.
    """
    return [_plain(names[label] if names else "") or f"class {label}" for label in labels]


def _plain(name: str) -> str:
    letters = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return letters.strip() if letters.isascii() and letters.isprintable() else ""


def _listed(names: Sequence[str]) -> str:
    """The names that there are, the first ones of many."""
    cut = [name if len(name) <= _LONGEST_LISTED else f"{name[: _LONGEST_LISTED - 3]}..." for name in names[:_LISTED]]
    return ", ".join(cut) + (f", ... ({len(names)} names in all)" if len(names) > _LISTED else "")
