"""From a foreign file to a checkpoint of ours: which format it is, and a folder as runs write them."""

import os
from pathlib import Path

import torch

from ...core.errors import InputError
from ...core.settings import excerpt
from ...core.terminal import say
from ...core.user_cache import cache_folder
from ..checkpoints.verify import sha256_of
from ..checkpoints.write import write
from ..denoiser import build_denoiser
from . import edm, edm2, openai
from .base import CantImport, Imported, Source, Told
from .files import read_source

FORMATS = {"openai": openai, "edm": edm, "edm2": edm2}
WEIGHTS = "imported"  # what they are called in the checkpoint


def read_foreign(file: Path, told: Told, wanted: str | None = None) -> tuple[str, Imported]:
    """Which format a file has, and the network in it, checked against its own shapes.

    Args:
        wanted: the format that it must have; None: whichever knows its names.

    Raises:
        InputError: it has none that is known, or not what belongs to it.
    """
    source = read_source(file)
    name = next((name for name, known in FORMATS.items() if known.knows(source)), None)
    if name is None:
        example = f"{len(source.tensors):,} tensors, as {next(iter(source.tensors), 'none')!r}"
        raise InputError(f"{file} is of a network that is not known here", example, f"one of {', '.join(FORMATS)}")
    if wanted not in (None, name):
        raise InputError(f"{file} has another format", name, wanted, f"format={name}, or leave it out")
    try:
        found = FORMATS[name].read(source, told)
        _check_fits(source, found)
    except CantImport:
        raise
    except (InputError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        # Names that are known with shapes that no such network has; settings that they come to may be out of range.
        reason = excerpt(" ".join(str(error).split()) or type(error).__name__)
        raise InputError(f"{file} has shapes that make no {name} network", reason) from None
    return name, found


def _check_fits(source: Source, found: Imported) -> None:
    """Raises InputError naming the first tensor that its network lacks, or has in another shape."""
    with torch.device("meta"):
        own = build_denoiser(found.denoiser, found.backbone).state_dict()
    for name in [*own, *sorted(found.weights)]:
        here = "backbone." in name and name.split(".", 1)[1]
        if name not in found.weights or name not in own:
            where = "network" if name in own else "file"
            raise CantImport(f"{source.name} does not fit its network: only the {where} has {here}")
        if own[name].shape != found.weights[name].shape:
            got, wanted = list(found.weights[name].shape), list(own[name].shape)
            raise CantImport(f"{source.name} does not fit its network: {here}", f"shape {got}", f"{wanted}")


def import_file(file: Path, folder: Path, told: Told, wanted: str | None = None) -> tuple[str, Imported]:
    """Write a foreign file as the checkpoint `folder`; says which format it has, and what was found.

    Raises:
        InputError: see `read_foreign`.
        OSError: the folder can't be written.
    """
    name, found = read_foreign(file, told, wanted)
    provenance = {"format": name, "file": file.name, "sha256": sha256_of(file), "told": told.words()}
    if found.licence:
        provenance["licence"] = found.licence
    write(
        folder,
        {WEIGHTS: found.weights},
        None,
        step=0,
        finished=True,
        ema=WEIGHTS,
        denoiser=found.denoiser,
        backbone=found.backbone,
        provenance=provenance,
    )
    return name, found


def imported(file: Path) -> Path:
    """The checkpoint of a foreign file, made once and kept in the user's cache by the file's content and name.

    Raises:
        InputError: see `read_foreign`; a file that does not say enough belongs to cm-convert.
    """
    home = cache_folder("imported") / sha256_of(file)[:32]
    folder = home / f"{file.stem[:80]}"
    if not os.path.isdir(folder):
        name, found = import_file(file, folder, Told())
        say(f"{file}: {describe(name, found)}")
        say_licence(found)
    return folder


def describe(name: str, found: Imported) -> str:
    """A foreign network in words."""
    c, count = found.denoiser, sum(value.numel() for value in found.weights.values())
    kind = "a diffusion model" if c.kind == "diffusion" else "a consistency model"
    classes = f", {c.num_classes:,} classes" if c.num_classes else ""
    size = f"{c.image_size}x{c.image_size}x{c.image_channels}"
    return f"{name}, {kind}, {found.backbone.name} of {count:,} numbers, {size}{classes}"


def say_licence(found: Imported) -> None:
    """What binds the weights, where that is known."""
    if found.licence:
        say(f"note: its weights are under {found.licence}")
