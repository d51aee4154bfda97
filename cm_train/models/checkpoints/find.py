"""From what a person names to a checkpoint of ours: a run, one of its checkpoints, or somebody else's file."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ...core.run_layout import CHECKPOINTS, run_of, step_of
from ..formats.importing import imported
from .manifest import MANIFEST, DamagedCheckpoint, Manifest, read_manifest
from .read import NotThere, averaged_sha256, folders, latest, newest_manifest
from .vanishing import again, present
from .verify import verify

T = TypeVar("T")


@again
def resolve_known(path: str | os.PathLike[str], sha256: str) -> tuple[Path, Manifest]:
    """The checkpoint at `path`, or of the run that it belongs to, whose averaged weights have this hash, verified.

    Raises:
        InputError: it isn't there any more, or it is damaged.
    """
    given = _place(path)
    run = run_of(given)
    for folder in folders(run) or [given]:
        known = ""
        with contextlib.suppress(DamagedCheckpoint):
            known = averaged_sha256(read_manifest(folder))
        if known == sha256:
            return folder, verify(folder)
    resolve(path)  # says what is wrong where there is no checkpoint at all
    raise NotThere(
        f"no checkpoint of {run} is the teacher that this run began with",
        allowed=f"one whose averaged weights have the sha256 {sha256[:16]}...",
        fix="bring it back, name it with teacher=..., or start a run of its own with name=...",
    )


def resolve(path: str | os.PathLike[str]) -> tuple[Path, Manifest]:
    """The checkpoint that `path` means, verified: a run folder (its newest good one) or one checkpoint folder.

    Raises:
        InputError: there is no checkpoint at `path`, or it is damaged.
    """
    folder = _place(path)
    if os.path.isfile(folder / MANIFEST):
        return folder, verify(folder)
    if os.path.isdir(folder / CHECKPOINTS):
        found = latest(folder)
        if found is not None:
            return found
        raise NotThere(f"run {folder} has no checkpoint yet", fix="train it longer, or lower save_every")
    run = run_of(folder)
    if run != folder and os.path.isdir(folder.parent) and not os.path.lexists(folder):
        raise NotThere(f"run {run} has no such checkpoint, or not any more", str(path), fix=f"{run} for its newest")
    if step_of(folder.name) is not None and os.path.isdir(folder):
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST} is missing")
    runs = sorted(p.parent.name for p in folder.parent.glob("*/checkpoints")) if os.path.isdir(folder.parent) else []
    raise NotThere(
        "no checkpoint there",
        str(path),
        "a run folder, a checkpoint folder, or a file of weights",
        f"one of {', '.join(runs)}" if runs else None,
    )


def peek(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint that `path` means, its files unchecked: enough to know the network in it.

    Raises:
        InputError: there is no checkpoint at `path`, or its manifest is damaged.
    """
    folder = _place(path)
    if os.path.isfile(folder / MANIFEST):
        return read_manifest(folder)
    newest = newest_manifest(folder) if os.path.isdir(folder / CHECKPOINTS) else None
    return resolve(path)[1] if newest is None else newest  # `resolve` says what is wrong


@again
def read(path: str | os.PathLike[str], load: Callable[[Path, Manifest], T]) -> T:
    """What `load` makes of the checkpoint that `path` means, as `resolve` finds it.

    The run may be in training: a checkpoint that is removed while `load` reads it is looked for anew.
    """
    folder, manifest = resolve(path)
    with present(folder):
        return load(folder, manifest)


def _place(path: str | os.PathLike[str]) -> Path:
    """The folder that `path` means; where it is a file, that of the checkpoint which was made of it."""
    place = Path(os.path.expanduser(path))  # os.path's functions take any text: no such user, a name too long
    return imported(place) if os.path.isfile(place) else place
