"""Checkpoints: folders that appear whole or not at all, are verified before use, and can't run code.

step_00001000/  denoiser.safetensors  ema_<decay>.safetensors  state.pt  manifest.json
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from ...core.errors import InputError
from ...core.files import is_there, may_pass, patiently, unreadable, write_whole
from ...core.run_layout import CHECKPOINTS, SAVED, STATE, step_folder, step_of
from ...core.settings import excerpt
from ...core.terminal import complain
from . import state_file
from .manifest import MANIFEST, DamagedCheckpoint, Manifest, damaged, read_manifest, signed
from .vanishing import again, present
from .verify import verify

T = TypeVar("T")

_BRING_BACK = "bring them back; or start over under another name=..., or with this run's folder moved away"


class NotThere(InputError):
    """There is no checkpoint, or not the one that is wanted."""


def folders(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first: by number, since names of eight digits and of nine don't sort.

    Raises:
        InputError: there is something under their name that can't be looked into.
    """
    home = run / CHECKPOINTS
    try:
        names = patiently(lambda: os.listdir(home)) if is_there(home) else []
    except OSError as error:
        reason = "it leads nowhere" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"the checkpoints of {run} can't be seen: {home}: {reason}", fix=_BRING_BACK) from None
    steps = {name: step for name in names if (step := step_of(name)) is not None}
    return [home / name for name in sorted(steps, key=steps.__getitem__, reverse=True)]


def record_save(run: Path, step: int) -> None:
    """Note, outside of `checkpoints/`, that a run has saved: what was saved and can't be seen must not start over.

    Where that can't be written it is left to the next time.
    """
    with contextlib.suppress(OSError):
        write_whole(run / SAVED, json.dumps({"step": step}).encode())


def _check_none_saved(run: Path) -> None:
    """For a run without a checkpoint in sight. Raises InputError where it has saved one, or that can't be told."""
    try:
        has_saved = is_there(run / SAVED)
    except OSError as error:
        raise unreadable(run, error) from None
    if has_saved:
        raise NotThere(f"{run} has saved checkpoints, and none is in {run / CHECKPOINTS}", fix=_BRING_BACK)


@again
def latest(run: Path, set_aside: bool = False) -> tuple[Path, Manifest] | None:
    """The newest good checkpoint of a run, or None where there is none at all.

    A damaged newer one is named and passed over; `set_aside` also renames it, so that it is not met again. Where none
    is good nothing is renamed: the run must not look like one that never saved.

    Raises:
        DamagedCheckpoint: there are checkpoints and none is good.
        InputError: there must be some, and they can't be seen or read.
    """
    bad: list[tuple[Path, DamagedCheckpoint]] = []
    for folder in folders(run):
        try:
            manifest = verify(folder)
            if folder.name != step_folder(run, manifest.step).name:
                raise damaged(folder, f"it is of step {manifest.step}")
        except DamagedCheckpoint as error:
            bad.append((folder, error))
            continue
        for broken, reason in bad:
            complain(f"{reason}; using {folder.name}")
            if set_aside:
                os.replace(broken, _unused(broken.with_name(f"damaged_{broken.name}")))
        return folder, manifest
    if bad:
        raise bad[0][1]
    _check_none_saved(run)
    return None


def _unused(path: Path) -> Path:
    candidates = (path, *(path.with_name(f"{path.name}_{i}") for i in range(2, 10_000)))
    return next(p for p in candidates if not p.exists())


@again
def newest_manifest(run: Path) -> Manifest | None:
    """The manifest of a run's newest checkpoint whose manifest is readable, its files unchecked; None without any.

    Raises:
        DamagedCheckpoint: there are checkpoints, and no manifest is readable.
        InputError: there must be some, and they can't be seen or read.
    """
    first: DamagedCheckpoint | None = None
    for folder in folders(run):
        try:
            with present(folder):
                return read_manifest(folder)
        except DamagedCheckpoint as error:
            first = first or error
    if first is not None:
        raise first
    _check_none_saved(run)
    return None


def averaged_sha256(manifest: Manifest) -> str:
    """What a run's provenance knows its teacher by: the sha256 of the weights that `weights=ema` means."""
    entry = manifest.files.get(f"{manifest.ema}.safetensors")
    return "" if entry is None else entry.sha256


def averaged_only(folder: Path) -> dict[str, Path | str]:
    """A checkpoint that is good for sampling and no more: its averaged weights, and the text of a manifest of them."""
    manifest = read_manifest(folder)
    file = f"{manifest.ema}.safetensors"
    rest = manifest.model_copy(update={"files": {file: manifest.files[file]}})
    return {file: folder / file, MANIFEST: signed(rest.model_dump(mode="json"))}


def read_state(folder: Path) -> dict[str, Any]:
    """What was saved as `state`, on the CPU: nested dicts of tensors and numbers, no larger than the file.

    Raises:
        DamagedCheckpoint: it is anything else.
    """
    file = folder / STATE
    try:
        return patiently(lambda: state_file.read(file))
    except Exception as error:  # torch raises a dozen types here
        if may_pass(error):
            raise unreadable(file, error) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpoint(f"{file} can't be read: {excerpt(reason)}") from None
