"""Which pictures of a set nobody trains on: they tell what a model has learnt from what it knows by heart."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import InputError
from .fingerprint import DIGEST_BYTES, below_shared
from .image_files import ImageFiles

_USUAL, _LEAST = 0.05, 64  # the share that is held out where nobody says, and the number below which it tells nothing
_KEY = b"held out 1\n"  # changing it would move pictures of every set to the other side
_BYTES = 8  # of a hash that say where in [0, 1) a picture is


@dataclass(frozen=True)
class Held:
    """Which files of a set are held out, bool [N], and how that came about, in words."""

    mask: Tensor
    words: str


def usual_share(count: int) -> float:
    """The share of `count` pictures that is held out where nobody says."""
    return _USUAL if _USUAL * count >= _LEAST else 0.0


def usual_in_words(count: int, share: float) -> str:
    """What a person should hear of `usual_share`."""
    if share == 0:
        few = f"of {count:,} pictures, {_USUAL:.0%} are too few to tell anything"
        return f"holding out none: {few} (dataset.holdout=0.1 holds out a tenth)"
    return f"holding out {share:.0%}, about {round(share * count):,} of {count:,} pictures, for cm-eval"


def held_out(files: ImageFiles, names: list[str], digests: bytes, share: float, group: str | None, root: str) -> Held:
    """The files whose place in [0, 1) is below `share`, by a hash of what is in them, or of what `group` finds.

    Each is told by itself, so that pictures which come later move no other one, and equal files are on one side.

    Args:
        names: of `files`, sorted.
        digests: of their ends, one after another, see `fingerprint.look`.
        share: in [0, 1).
        group: a regular expression; names in which it finds the same groups (or all of the same, where it has none)
            are on one side. They count from the lowest folder that all files are in. Where it finds nothing the
            file's content counts.

    Raises:
        InputError: none of them is held out, or all are; or `group` tells nothing.
    """
    if share == 0:
        raise InputError(f"no pictures of {root} are held out", "dataset.holdout=0", "a share below 1")
    contents = [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]
    keys = [b"%s %d" % (digest, files.sizes[name] or 0) for digest, name in zip(contents, names, strict=True)]
    words = ""
    if group is not None:
        found = list(_found(group, names))
        texts = zip(found, keys, strict=True)
        keys = [key if text is None else text.encode(errors="backslashreplace") for text, key in texts]
        words = _grouped(group, found, names, root)
    mask = torch.tensor([_place(key) < share for key in keys])
    num = int(mask.sum())
    if num in (0, len(names)):
        which, fix = ("none", "larger") if num == 0 else ("all", "smaller")
        what = f"dataset.holdout={share} holds out {which} of the {len(names):,} pictures in {root}"
        raise InputError(what, words or None, fix=f"a {fix} dataset.holdout=, or 0 to train on all pictures")
    said = f"held out {num:,} of {len(names):,} pictures, for cm-eval"
    return Held(mask, f"{said}; {words}" if words else said)


def _place(key: bytes) -> float:
    return int.from_bytes(hashlib.sha256(_KEY + key).digest()[:_BYTES]) / 2 ** (8 * _BYTES)


def _found(group: str, names: list[str]) -> Iterator[str | None]:
    """What tells one group from another in each name; None where the pattern is not in it, or says nothing."""
    pattern = re.compile(group)
    for name in below_shared(names):
        match = pattern.search(name)
        parts = [] if match is None else match.groups() if pattern.groups else [match[0]]
        yield "".join(filter(None, parts)) or None


def _grouped(group: str, found: list[str | None], names: list[str], root: str) -> str:
    """Into how many groups; see `held_out` for what it raises."""
    groups, num = {text for text in found if text is not None}, sum(text is not None for text in found)
    example = below_shared(names)[0]
    if not groups:
        what = f"dataset.group finds nothing in the names of the pictures in {root}"
        raise InputError(what, group, f"a regular expression that is found in names as {example!r}", "another one")
    if len(groups) == 1 and num == len(names):
        what = f"dataset.group puts all pictures in {root} into one group, {groups.pop()!r}"
        raise InputError(what, group, "one that tells some names from others", "another one, or drop dataset.group=")
    rest = f", the other {len(names) - num:,} by their content" if num < len(names) else ""
    return f"{num:,} of them in {len(groups):,} groups by their names{rest}"
