"""What cm-sample does: images from a checkpoint, into a folder that is one request's."""

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import Field, field_validator

from .. import __version__
from ..core.errors import ExitCode, InputError
from ..core.settings import Count, Settings, Text, typed
from ..core.signals import StopFlag, Stopped
from .sample_folder import REQUEST, SHARES, Request, claimed, default_name, writing

if TYPE_CHECKING:
    from .draw_batches import Job
    from .sample_files import ImageFiles

GRID, GRID_IMAGES = "grid.png", 100


class SampleConfig(Settings):
    """The keys of cm-sample."""

    ckpt: Text
    num: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)] | None
    sigmas: list[float] | None
    sampler: str
    weights: Text
    labels: int | str | list[int | str] | None
    guidance: Annotated[float, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)]
    out: Text | None
    format: Literal["png", "npz"]
    device: str
    devices: Count | Literal["auto"] = "auto"
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    plugins: list[Text] = []

    @field_validator("sampler")
    @classmethod
    def _is_known(cls, value: str) -> str:
        from ..sampling.choosing import check_sampler

        check_sampler(value)
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _names_or_numbers(cls, value: Any) -> Any:
        for label in value if isinstance(value, list) else [value]:
            if isinstance(label, bool | float):
                raise ValueError(
                    f"a class is a name or a number; got {label}; fix: a name that looks like that in quotes"
                )
        return value


def sample(cfg: DictConfig, stop: StopFlag | None = None) -> ExitCode:
    """The command on its composed config; its exit code.

    Args:
        stop: which hears of signals, and has processes that draw hear of them too.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue:
        raise InputError("no checkpoint given", fix="cm-sample runs/<name>") from None
    assert isinstance(values, dict)
    from ..core import plugins

    plugins.load(plugins.names_in(values))  # before the config is typed, which may name a sampler of theirs
    config = typed(SampleConfig, {str(k): v for k, v in values.items()}, as_written=True)
    try:
        _sample(config, stop or StopFlag())
    except Stopped as stopped:
        from ..core.terminal import say

        say(str(stopped) or "stopped before the first image")
        return ExitCode.STOPPED
    return ExitCode.DONE


def _sample(config: SampleConfig, stop: StopFlag) -> None:
    from ..core.terminal import say
    from .sample_files import open_files

    job = _prepare(config)
    out = job.out
    _announce(job)
    with claimed(out, job.request) as whole:
        with writing(out):
            files = open_files(config.format, out, job.denoiser.config.image_shape, config.seed)
            missing = files.missing(config.num)
        if len(missing) < config.num:
            say(f"{config.num - len(missing)} of {config.num} images are there already")
        if missing:
            try:
                _draw(config, job, files, missing, stop)
            except Stopped:
                # By its checkpoint: what a run's folder means is another one once it has trained on.
                again = f"the command with {shlex.quote(f'ckpt={job.checkpoint}')} goes on"
                raise Stopped(f"stopped: what was drawn is kept in {out}, and {again}") from None
        _finish(job, whole, files, bool(missing))
    if whole.num > config.num:
        say(f"note: {out} is of a request with num={whole.num}")
    if not missing:
        say(f"nothing to draw; the images are in {out}")
        return
    say(f"wrote to {out}:")
    new = " new" if len(missing) < config.num else ""
    say(f"  {files.names(missing)} ({len(missing)}{new} image{'s' * (len(missing) > 1)})")
    say(f"  {GRID}, {REQUEST}")


def _prepare(config: SampleConfig) -> "Job":
    """Load the checkpoint, and find out what is wanted of it; nothing is written yet. Raises InputError."""
    from ..core.memory import shortage_explained
    from ..models.checkpoints.load import load_checkpoint
    from ..models.checkpoints.weights import sha256_of_weights
    from ..sampling.choosing import choose_levels, find_sampler
    from ..sampling.guidance import guided
    from ..sampling.labels import class_numbers
    from .draw_batches import Job
    from .draw_shares import num_processes

    device = _device(config.device)
    if num_processes(config.devices, device) > 1 and config.num > config.batch_size:
        device = "cpu"  # others draw: a GPU has no memory for two of us
    with shortage_explained("while the checkpoint was being loaded", "device=cpu, or less beside it on this machine"):
        folder, manifest, denoiser = load_checkpoint(config.ckpt, config.weights, device)
    known = denoiser.config
    name, sampler = find_sampler(config.sampler, known.kind)
    request = Request(
        cm_train=__version__,
        ckpt=config.ckpt,
        step=manifest.step,
        weights=config.weights,
        sha256=sha256_of_weights(manifest, config.weights),
        num=config.num,
        seed=config.seed,
        sampler=name,
        sigmas=choose_levels(sampler, known, config.steps, config.sigmas),
        labels=None if config.labels is None else class_numbers(config.labels, config.num, known),
        guidance=config.guidance,
        precision=config.precision,
        format=config.format,
    )
    if config.out is None:
        unusual = "" if name == find_sampler("auto", known.kind)[0] else name
        has_levels = config.sigmas is not None
        out = Path("samples") / default_name(folder, request, unusual, has_levels, known.class_names)
    else:
        out = Path(os.path.expanduser(config.out))
    return Job(request, folder, guided(denoiser, config.guidance), sampler, out)


def _announce(job: "Job") -> None:
    from ..core.terminal import say
    from ..sampling.labels import in_words

    request, calls = job.request, job.sampler.num_calls(len(job.request.sigmas))
    each = f"{calls} network call{'s' * (calls > 1)} each"
    say(f"{request.num} images from {job.checkpoint}, {request.weights} weights, {each}")
    if named := in_words(request.labels, job.denoiser.config.class_names):
        say(f"of class {named}")


def _draw(config: SampleConfig, job: "Job", files: "ImageFiles", missing: list[int], stop: StopFlag) -> None:
    """Draw what is missing: here, or by several processes where there are batches for them."""
    from ..core.progress import progress
    from ..core.terminal import say
    from .draw_batches import draw
    from .draw_shares import Order, draw_in_shares, num_processes

    device, size = _device(config.device), min(config.batch_size, len(missing))
    wanted, batches = num_processes(config.devices, device), -(-len(missing) // size)
    num = min(wanted, batches)
    if num < wanted and config.devices != "auto":
        smaller = max(1, len(missing) // wanted)
        say(f"note: batches of {size} leave {wanted - num} of {wanted} processes idle; fix: batch_size={smaller}")
    if num > 1:
        order = Order(
            request=job.request,
            checkpoint=str(job.checkpoint),
            on_gpus=device != "cpu",
            places=missing,
            batch_size=size,
            compile=config.compile,
        )
        draw_in_shares(num, order, job.out, stop)
        return
    job.denoiser.to(device)
    with progress(len(missing), "sampling") as bar:
        draw(job, files, missing, size, config.compile, bar.advance)


def _finish(job: "Job", whole: Request, files: "ImageFiles", has_new: bool) -> None:
    """Make the grid of what `whole` asked for, and whatever else comes last."""
    from ..data.pixels import grid
    from ..sampling.by_hand import captions
    from .sample_files import save_whole

    picture, seed = job.out / GRID, whole.seed
    with writing(job.out):
        if has_new or not picture.exists():
            images = files.read(min(whole.num, GRID_IMAGES))
            words = captions(job.denoiser, range(seed, seed + len(images)), whole.classes(len(images)))
            save_whole(grid(images, captions=words), picture, job.out / f".{GRID}.writing")
        files.finish()
    shutil.rmtree(job.out / SHARES, ignore_errors=True)  # of a command that was killed


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    known = ["cpu"]
    if gpus:
        known += ["cuda", *(f"cuda:{i}" for i in range(gpus))]
    if asked not in known:
        raise InputError("no such device here", asked, ", ".join(["auto", *known]))
    return asked
