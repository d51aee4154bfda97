"""Checkpoints: folders that appear whole or not at all, are verified before use, and can't run code.

step_00001000/  denoiser.safetensors  ema_<decay>.safetensors  state.pt  manifest.json
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from . import state_file
from .errors import InputError
from .manifest import MANIFEST, DamagedCheckpoint, Manifest, damaged, read_manifest, signed
from .registry import shown
from .tracking import complain

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}  # safetensors' names


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every file has been checked.

    Raises:
        DamagedCheckpoint: a file is missing, truncated, altered, oversized or has a hostile header.
    """

    def bad(what: str) -> DamagedCheckpoint:
        return damaged(folder, what)

    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        file = folder / name
        if Path(name).name != name or name in ("", ".", ".."):
            raise bad(f"{MANIFEST} names a file outside the folder: {shown(name)!r}")
        if os.path.islink(file) or not os.path.isfile(file):
            raise bad(f"{shown(name)} is missing")
        try:
            size, digest = file.stat().st_size, sha256_of(file)
        except PermissionError:
            raise InputError(f"{file} may not be read by this user", fix="ask its owner for chmod -R a+r") from None
        except OSError as error:
            raise bad(f"{name} can't be read ({error.strerror})") from None
        if size != entry.size:
            raise bad(f"{name} has {size} bytes instead of {shown(entry.size)}")
        if digest != entry.sha256:
            raise bad(f"{name} does not match its sha256")
    for file in sorted(folder.glob("*.safetensors")):
        if not os.path.isfile(file):
            raise bad(f"{file.name} is not a file")
        try:
            with safe_open(file, "pt"):  # checks that the header is bounded, and its offsets inside the file
                pass
        except (SafetensorError, OSError) as error:
            raise bad(f"{file.name}: {error}") from None
    return manifest


def folders(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first: by number, since names of eight digits and of nine don't sort."""
    return sorted((run / "checkpoints").glob("step_[0-9]*"), key=_step_in_name, reverse=True)


def _step_in_name(folder: Path) -> int:
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def latest(run: Path, set_aside: bool = False) -> tuple[Path, Manifest] | None:
    """The newest good checkpoint of a run, or None where there is none at all.

    A damaged newer one is named and passed over; `set_aside` also renames it, so that it is not met again. Where none
    is good nothing is renamed: the run must not look like one that never saved.

    Raises:
        DamagedCheckpoint: there are checkpoints and none is good.
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
    return None


def _unused(path: Path) -> Path:
    candidates = (path, *(path.with_name(f"{path.name}_{i}") for i in range(2, 10_000)))
    return next(p for p in candidates if not p.exists())


def newest_manifest(run: Path) -> Manifest | None:
    """The manifest of a run's newest checkpoint whose manifest is readable, its files unchecked; None without any."""
    for folder in folders(run):
        with contextlib.suppress(InputError):
            return read_manifest(folder)
    return None


def resolve(path: str | os.PathLike[str]) -> tuple[Path, Manifest]:
    """The checkpoint that `path` means, verified: a run folder (its newest good one) or one checkpoint folder.

    Raises:
        InputError: there is no checkpoint at `path`, or it is damaged.
    """
    folder = Path(os.path.expanduser(path))  # os.path's functions take any text: no such user, a name too long
    if os.path.isfile(folder / MANIFEST):
        return folder, verify(folder)
    if os.path.isdir(folder / "checkpoints"):
        found = latest(folder)
        if found is not None:
            return found
        raise InputError(f"run {folder} has no checkpoint yet", fix="train it longer, or lower save_every")
    if folder.name.startswith("step_") and os.path.isdir(folder):
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST} is missing")
    runs = sorted(p.parent.name for p in folder.parent.glob("*/checkpoints")) if os.path.isdir(folder.parent) else []
    raise InputError(
        "no checkpoint there",
        str(path),
        "a run folder or a checkpoint folder",
        f"one of {', '.join(runs)}" if runs else None,
    )


def averaged_only(folder: Path) -> dict[str, Path | str]:
    """A checkpoint that is good for sampling and no more: its averaged weights, and the text of a manifest of them."""
    manifest = read_manifest(folder)
    file = f"{manifest.ema}.safetensors"
    rest = manifest.model_copy(update={"files": {file: manifest.files[file]}})
    return {file: folder / file, MANIFEST: signed(rest.model_dump(mode="json"))}


def read_weights(folder: Path, manifest: Manifest, weights: str, module: nn.Module) -> None:
    """Load the named weights ("ema", "raw" or "ema_<decay>") into `module`, in place.

    Raises:
        InputError: no such weights, or a tensor with another name, shape or type than the network's.
    """
    stem = stem_of(folder, manifest, weights)
    check_fits(folder / f"{stem}.safetensors", module)
    tensors = load_file(folder / f"{stem}.safetensors")
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(tensors[name])


def stem_of(folder: Path, manifest: Manifest, weights: str) -> str:
    """The file stem of named weights. Raises InputError where there are none."""
    stems = {name.removesuffix(".safetensors") for name in manifest.files if name.endswith(".safetensors")}
    stem = {"raw": "denoiser", "ema": manifest.ema}.get(weights, weights)
    if stem not in stems:
        known = ["ema", "raw", *sorted(s for s in stems if s.startswith("ema_"))]
        raise InputError(f"checkpoint {folder} has no such weights", weights, ", ".join(known))
    return stem


def check_fits(file: Path, module: nn.Module) -> None:
    """Compare a safetensors file's header with a network, which may be on the meta device; no tensor is read.

    Raises:
        InputError: naming the first tensor that one of both lacks, or whose shape or type differs.
    """
    own = module.state_dict()
    try:
        with safe_open(file, "pt") as stored:
            names = set(stored.keys())
            headers = {name: stored.get_slice(name) for name in own if name in names}
            types = {name: (header.get_dtype(), header.get_shape()) for name, header in headers.items()}
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpoint(f"{file} can't be read: {error}") from None
    for name in [*own, *sorted(names)]:
        if name not in names or name not in own:
            where = "network" if name in own else "checkpoint"
            raise InputError(f"{file} does not fit the network: only the {where} has {shown(name)}")
        (dtype, shape), wanted = types[name], list(own[name].shape)
        if shape != wanted or dtype != _DTYPES.get(own[name].dtype):
            raise InputError(
                f"{file} does not fit the network: {name}",
                f"{dtype} {shape}",
                f"{_DTYPES.get(own[name].dtype, own[name].dtype)} {wanted}",
            )


def read_state(folder: Path) -> dict[str, Any]:
    """What was saved as `state`, on the CPU: nested dicts of tensors and numbers, no larger than the file.

    Raises:
        DamagedCheckpoint: it is anything else.
    """
    file = folder / "state.pt"
    try:
        return state_file.read(file)
    except Exception as error:  # torch raises a dozen types here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpoint(f"{file} can't be read: {shown(reason)}") from None
