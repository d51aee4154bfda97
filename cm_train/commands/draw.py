"""What cm-sample does: images from a checkpoint, into a folder that is one request's."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import Field, field_validator

from .. import __version__
from ..core.errors import ExitCode, InputError
from ..core.settings import Settings, Text, typed
from ..core.signals import Stopped, heed
from .sample_folder import Request, claimed, default_name, writing

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.denoiser import Denoiser
    from ..sampling.guidance import Guided
    from ..sampling.samplers.base import Sampler
    from .sample_files import ImageFiles

GRID_IMAGES = 100


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


def sample(cfg: DictConfig) -> ExitCode:
    """The command on its composed config; its exit code."""
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue:
        raise InputError("no checkpoint given", fix="cm-sample runs/<name>") from None
    assert isinstance(values, dict)
    from ..core import plugins

    plugins.load(plugins.names_in(values))  # before the config is typed, which may name a sampler of theirs
    config = typed(SampleConfig, {str(k): v for k, v in values.items()}, as_written=True)
    try:
        _sample(config)
    except Stopped as stopped:
        from ..core.terminal import say

        say(str(stopped) or "stopped before the first image")
        return ExitCode.STOPPED
    return ExitCode.DONE


@dataclass(frozen=True)
class _Job:
    """A request, what draws it, and where its images go."""

    request: Request
    checkpoint: Path  # the folder that `denoiser` is from
    denoiser: "Denoiser | Guided"
    sampler: "Sampler"
    out: Path


def _sample(config: SampleConfig) -> None:
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
                _draw(job, files, missing, config.batch_size, config.compile)
            except Stopped:
                # By its checkpoint: what a run's folder means is another one once it has trained on.
                same = shlex.quote(f"ckpt={job.checkpoint}")
                raise Stopped(
                    f"stopped: what was drawn is kept in {out}, and the command with {same} goes on"
                ) from None
        picture = _finish(out, files, whole.num, bool(missing))
    if whole.num > config.num:
        say(f"note: {out} is of a request with num={whole.num}")
    say(f"wrote {picture} and the images beside it" if missing else f"nothing to draw; the images are in {out}")


def _prepare(config: SampleConfig) -> _Job:
    """Load the checkpoint, and find out what is wanted of it; nothing is written yet. Raises InputError."""
    from ..core.memory import shortage_explained
    from ..models.checkpoints.load import load_checkpoint
    from ..models.checkpoints.weights import sha256_of_weights
    from ..sampling.choosing import choose_levels, find_sampler
    from ..sampling.guidance import guided
    from ..sampling.labels import class_numbers

    device = _device(config.device)
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
    return _Job(request, folder, guided(denoiser, config.guidance), sampler, out)


def _announce(job: _Job) -> None:
    from ..core.terminal import say
    from ..sampling.labels import in_words

    request, calls = job.request, job.sampler.num_calls(len(job.request.sigmas))
    each = f"{calls} network call{'s' * (calls > 1)} each"
    say(f"{request.num} images from {job.checkpoint}, {request.weights} weights, {each}")
    if named := in_words(request.labels, job.denoiser.config.class_names):
        say(f"of class {named}")


def _draw(job: _Job, files: "ImageFiles", places: list[int], batch_size: int, compiled: bool) -> None:
    """Draw the images of `places`, and write each batch as it comes; a signal is heeded at each network call."""
    from ..core.memory import shortage_explained
    from ..core.precision import arithmetic
    from ..core.progress import progress
    from ..core.world import ALONE
    from ..models.compiling import CompiledBlocks
    from ..sampling.generate import generate_batches
    from ..sampling.labels import one_an_image
    from ..training.compile_policy import compile_alike

    request, batch_size, classes = job.request, min(batch_size, len(places)), None
    if request.labels is not None:
        classes = one_an_image(request.labels, request.num, job.denoiser.config.num_classes)

    def batches(places: list[int], levels: list[float]) -> "Iterator[Tensor]":
        return generate_batches(
            job.denoiser,
            job.sampler,
            levels,
            [request.seed + place for place in places],
            None if classes is None else [classes[place] for place in places],
            batch_size=batch_size,
            precision=request.precision,
            whole_batches=compiled,
        )

    def try_out() -> "Tensor":  # at one level: that is one network call, and all are alike
        return next(batches(places[:batch_size], request.sigmas[:1]))

    fix = f"batch_size={max(1, batch_size // 2)} (now {batch_size})"
    job.denoiser.register_forward_pre_hook(lambda *_: heed())
    with shortage_explained(f"drawing {batch_size} images at once", fix), progress(len(places), "sampling") as bar:
        if compiled:
            blocks = CompiledBlocks(job.denoiser)
            with arithmetic(request.precision):
                compile_alike(blocks, try_out, "true", ALONE, lambda: False)
        left = iter(places)
        for images in batches(places, request.sigmas):
            with writing(job.out):
                files.add([*islice(left, len(images))], images)
            bar.advance(len(images))


def _finish(out: Path, files: "ImageFiles", num: int, has_new: bool) -> Path:
    """Make the grid and whatever else comes last; returns the grid's path."""
    from ..data.pixels import grid
    from .sample_files import save_whole

    picture = out / "grid.png"
    with writing(out):
        if has_new or not picture.exists():
            save_whole(grid(files.read(min(num, GRID_IMAGES))), picture, out / ".grid.png.writing")
        files.finish()
    return picture


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
