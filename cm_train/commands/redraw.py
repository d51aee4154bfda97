"""cm-sample from=PICTURE: draw it again from what it says made it, and compare every pixel."""

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..core.errors import ExitCode, InputError
from ..core.memory import shortage_explained
from ..core.run_layout import run_of, step_folder
from ..core.settings import excerpt
from ..core.signals import heed
from ..core.terminal import complain, say
from ..data.pixels import decoded_png
from ..data.png_notes import read_noted
from ..models.checkpoints.find import resolve
from ..models.checkpoints.load import load_resolved
from ..models.checkpoints.manifest import Manifest, read_manifest
from ..models.checkpoints.read import folders
from ..models.checkpoints.vanishing import again
from ..models.checkpoints.verify import verify
from ..models.checkpoints.weights import sha256_of_weights
from ..models.denoiser import Denoiser
from ..sampling.choosing import choose_levels, find_sampler
from ..sampling.generate import generate_batches
from ..sampling.guidance import guided
from ..sampling.labels import one_an_image
from .device import device_for
from .picture_notes import Note
from .sample_config import RedrawConfig
from .sample_files import save_whole
from .sample_folder import writing

_SHORT = 16  # characters of a hash, enough to tell two apart
_SIZE = struct.Struct(">II")  # of a PNG, behind the first chunk's header
_SIZE_AT = 16


def redraw(config: RedrawConfig) -> ExitCode:
    """The command; DONE where the picture agrees within one grey level, FAILED where it does not.

    Raises:
        InputError: the picture is damaged or says nothing, its checkpoint can't be found, or `out` is taken.
        Stopped: by a signal.
    """
    picture = Path(os.path.expanduser(config.picture))
    content, text = read_noted(picture)
    note = Note.parsed(text, picture)
    out = None if config.out is None else Path(os.path.expanduser(config.out))
    _check_free(out)
    device = device_for(config.device)
    with shortage_explained("while the picture was drawn again", "device=cpu, or less beside it on this machine"):
        folder, denoiser = _loaded(note, config.ckpt, picture, device)
        say(f"seed {note.seed} from {folder}, {note.weights} weights, {_how(note)}")
        denoiser.register_forward_pre_hook(lambda *_: heed())
        image = _drawn(note, denoiser)
    code, verdict = _compared(content, image, picture)
    if code != ExitCode.DONE and note.cm_train != __version__:
        verdict += f"; cm_train {excerpt(note.cm_train)} drew it, and this is {__version__}"
    if out is not None:
        with writing(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            save_whole(image, out, out.with_name(f".{out.name}.writing"), note.text())
        say(f"wrote {out}")
    (say if code == ExitCode.DONE else complain)(f"{picture}: {verdict}")
    return code


def _drawn(note: Note, denoiser: Denoiser) -> Tensor:
    """uint8 [C, H, W]. Raises InputError where the note asks for what can't be had."""
    known = denoiser.config
    _, sampler = find_sampler(note.sampler, known.kind)
    levels = choose_levels(sampler, known, None, note.sigmas)
    labels = None if note.label is None else one_an_image([note.label], 1, known.num_classes)
    images = generate_batches(
        guided(denoiser, note.guidance),
        sampler,
        levels,
        [note.seed],
        labels,
        batch_size=1,
        precision=note.precision,
        whole_batches=False,
    )
    return next(images)[0]


def _check_free(out: Path | None) -> None:
    if out is None:
        return
    if out.suffix.lower() != ".png":
        raise InputError("out is a picture here", str(out), "a name that ends in .png")
    if os.path.lexists(out):
        raise InputError(f"{out} is there already, and is not overwritten", fix="another out=")


def _how(note: Note) -> str:
    steps = f"{note.steps} step{'s' * (note.steps > 1)} by {excerpt(note.sampler)}"
    if note.label is None:
        return steps
    return f"{steps}, of class {note.label if note.class_name is None else f'{note.class_name} ({note.label})'}"


@again
def _loaded(note: Note, given: str | None, picture: Path, device: str) -> tuple[Path, Denoiser]:
    """The checkpoint that made the picture, and its denoiser; by its hash, whatever its run has become since.

    Raises:
        InputError: it is not where the user or the picture says, or it is damaged.
    """
    folder = next(_found(note, given, picture), None)
    if folder is None:
        raise _not_found(note, given, picture)
    return folder, load_resolved(folder, verify(folder), note.weights, device)


def _found(note: Note, given: str | None, picture: Path) -> Iterator[Path]:
    """Folders of checkpoints that have the very weights."""
    for place in _places(note, given, picture):
        run = run_of(place)
        with contextlib.suppress(OSError, ValueError):  # InputError is a ValueError
            for folder in [step_folder(run, note.step), *(folders(run) or [place])]:
                with contextlib.suppress(OSError, ValueError):
                    if _hash(read_manifest(folder), note) == note.sha256:
                        yield folder


def _places(note: Note, given: str | None, picture: Path) -> list[Path]:
    """Where to look: what the user names; else as the picture says, from here, and from any folder above it."""
    place = Path(os.path.expanduser(note.ckpt if given is None else given))
    if given is not None or place.is_absolute():
        return [place]
    return [place, *(above / place for above in Path(os.path.abspath(picture)).parents)]


def _hash(manifest: Manifest, note: Note) -> str:
    try:
        return sha256_of_weights(manifest, note.weights)
    except KeyError:  # it has no such file
        return ""


def _not_found(note: Note, given: str | None, picture: Path) -> InputError:
    needed = f"the {excerpt(note.weights)} weights of step {note.step} with sha256 {excerpt(note.sha256)[:_SHORT]}..."
    if given is None:
        what = f"the checkpoint that made {picture} is not at {excerpt(note.ckpt)} any more"
        return InputError(what, allowed=needed, fix="ckpt=..., the run or checkpoint where it is now")
    folder, manifest = resolve(given)
    found = f"{excerpt(folder)} with sha256 {_hash(manifest, note)[:_SHORT]}..."
    return InputError(f"another checkpoint made {picture}", found, needed, "ckpt=... of that one")


def _compared(content: bytes, image: Tensor, picture: Path) -> tuple[ExitCode, str]:
    """Whether the picture in `content` is `image`, uint8 [C, H, W], and how far it is from that in words.

    Raises:
        InputError: its pixels can't be read.
    """
    size, (_, height, width) = _SIZE.unpack_from(content, _SIZE_AT), image.shape
    if size != (width, height):
        return ExitCode.FAILED, f"does not agree: it is {size[0]}x{size[1]}, and drawn again {width}x{height}"
    stored = decoded_png(io.BytesIO(content), (image.shape[0], height, width))
    if stored is None:
        raise InputError(f"the pixels of {picture} can't be read", fix="a whole copy of it, as it was written")
    apart = (stored.int() - image.int()).abs().amax(0)  # [H, W]
    most, count, total = int(apart.max()), int(torch.count_nonzero(apart)), apart.numel()
    if not most:
        return ExitCode.DONE, f"drawn again, every pixel agrees ({total})"
    first = torch.nonzero(apart == most)[0].tolist()
    where = f"{count} of {total} pixels differ, by {most} at most, as at row {first[0]}, column {first[1]}"
    if most == 1:
        return ExitCode.DONE, f"drawn again, it agrees within one grey level: {where}"
    return ExitCode.FAILED, f"drawn again, it does not agree: {where}"
