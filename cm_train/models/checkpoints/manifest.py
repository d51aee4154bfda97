"""manifest.json, the signed list of what a checkpoint is: its step, its network, its files and their hashes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny

from ...core import plugins
from ...core.errors import InputError
from ...core.files import may_pass, read_small, unreadable
from ...core.registry import UnknownComponent
from ...core.run_layout import MANIFEST
from ...core.settings import MAX_EXACT, Settings, excerpt, typed
from ..backbones.base import BackboneConfig
from ..denoiser import DenoiserConfig

FORMAT = 2
_MAX_MANIFEST_BYTES = 1 << 20

# The one word that format 1 had for a denoiser's kind and boundary.
_PRECONDITIONING = {
    "edm": ("diffusion", "zero"),
    "consistency": ("consistency", "sigma_min"),
    "trigflow": ("consistency", "zero"),
}


class FileEntry(Settings):
    """One file of a checkpoint: its sha256 in hex and its size in bytes."""

    sha256: str
    size: int


class Manifest(Settings):
    """What `manifest.json` holds."""

    format: int
    step: Annotated[int, Field(ge=0, le=MAX_EXACT)]
    finished: bool  # whether this was the run's last step
    ema: str  # the weights that `weights=ema` means, "ema_<decay>"
    denoiser: DenoiserConfig
    backbone: SerializeAsAny[BackboneConfig]
    provenance: dict[str, str]  # sha256 of the teacher, fingerprint of the data set
    files: dict[str, FileEntry]
    snapshots: list[int] | None = None  # the steps of a run's snapshots until then; None where it takes none
    plugins: list[str] = []  # those that brought the network
    versions: dict[str, int] = {}  # by which the run draws its random numbers, see `rng.NEWEST`; none: the first ones
    threads: int | None = None  # of each process that summed; another number adds in another order


class DamagedCheckpoint(InputError):
    """A checkpoint whose files are not what its manifest says."""


def signed(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest with the sha256 of all the rest of it: a flipped bit must not change a step."""
    values = {key: value for key, value in manifest.items() if key != "sha256"}
    return json.dumps(values | {"sha256": _digest(values)}, indent=2)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def damaged(folder: Path, what: str) -> DamagedCheckpoint:
    """What to raise about the checkpoint in `folder`."""
    return DamagedCheckpoint(f"checkpoint {folder} is damaged: {what}")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, typed; the files that it names are not looked at.

    Raises:
        DamagedCheckpoint: it is missing or not a manifest.
        InputError: it can't be read now, or has another format or a network that is not known here.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(read_small(path, _MAX_MANIFEST_BYTES).decode("utf-8"))
        whole = isinstance(values, dict) and values.pop("sha256", None) == _digest(values)
    except FileNotFoundError:
        raise damaged(folder, f"{MANIFEST} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        if may_pass(error):
            raise unreadable(path, error) from None
        raise damaged(folder, f"{MANIFEST} can't be read: {excerpt(error)}") from None
    if not isinstance(values, dict):
        raise damaged(folder, f"{MANIFEST} is not an object")
    if not whole:
        raise damaged(folder, f"{MANIFEST} does not match its own sha256")
    if values.get("format") not in (1, FORMAT):
        raise InputError(f"checkpoint {folder} has another format", excerpt(values.get("format")), f"1 to {FORMAT}")
    if values["format"] == 1:
        values = _from_format_1(values)
    try:
        return typed(Manifest, _with_int_keys(values), MANIFEST)
    except UnknownComponent as error:
        raise plugins.needed_for(f"checkpoint {folder}", values, error) from None
    except InputError as error:
        raise damaged(folder, str(error)) from None


def _from_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest that cm_train 0.1.0 wrote, as this version writes it; what makes no sense is left as it is."""
    denoiser = values.get("denoiser")
    if not isinstance(denoiser, dict) or denoiser.get("preconditioning") not in [*_PRECONDITIONING]:
        return values  # the typed check names what is wrong
    kind, boundary = _PRECONDITIONING[denoiser["preconditioning"]]
    rest = {key: value for key, value in denoiser.items() if key != "preconditioning"}
    return values | {"format": FORMAT, "denoiser": {"kind": kind, "boundary": boundary} | rest}


def _with_int_keys(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no integer keys; `sampling.points` does."""
    try:
        sampling = values["denoiser"]["sampling"]
        sampling["points"] = {int(k): v for k, v in sampling["points"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # the typed check names what is wrong
    return values
