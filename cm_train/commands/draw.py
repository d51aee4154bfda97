"""What cm-sample does: images from a checkpoint, into a folder that is one request's."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import Field, field_validator

from ..core import cli, registry
from ..core.errors import ExitCode, InputError
from ..core.settings import Settings, Text
from ..core.signals import Stopped, heed
from .sample_folder import Request, claimed, default_name, writing

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.checkpoints.manifest import Manifest
    from ..models.denoiser import Denoiser
    from .sample_files import ImageFiles

GRID_IMAGES = 100
_SHOWN = 5  # of a list, in a line or a name


class SampleConfig(Settings):
    """The keys of cm-sample."""

    ckpt: Text
    num: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)] | None
    sigmas: list[float] | None
    sampler: Literal["auto", "onestep", "multistep", "euler", "heun"]
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
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue:
        raise InputError("no checkpoint given", fix="cm-sample runs/<name>") from None
    assert isinstance(values, dict)
    config = registry.typed(SampleConfig, {str(k): v for k, v in values.items()})
    try:
        _sample(config)
    except Stopped as stopped:
        from ..core.terminal import say

        say(str(stopped) or "stopped before the first image")
        return ExitCode.STOPPED
    return ExitCode.DONE


def _sample(config: SampleConfig) -> None:
    from ..core import plugins
    from ..core.memory import shortage_explained
    from ..core.terminal import say
    from ..data.pixels import grid
    from ..models.checkpoints.load import load_checkpoint
    from ..sampling.generate import choose_levels, class_numbers
    from ..sampling.guidance import guided
    from .sample_files import open_files, save_whole

    plugins.load(config.plugins)
    device = _device(config.device)
    with shortage_explained("while the checkpoint was being loaded", "device=cpu, or less beside it on this machine"):
        folder, manifest, denoiser = load_checkpoint(config.ckpt, config.weights, device)
    known = denoiser.config
    guided(denoiser, config.guidance)  # refuses what can't be, before anything is written
    sampler, levels = choose_levels(denoiser, config.sampler, config.steps, config.sigmas)
    labels = None if config.labels is None else class_numbers(config.labels, config.num, known)
    request = Request(
        cm_train=cli.version("cm-train"),
        ckpt=config.ckpt,
        step=manifest.step,
        weights=config.weights,
        sha256=_sha256(manifest, config.weights),
        num=config.num,
        seed=config.seed,
        sampler=sampler,
        sigmas=levels,
        labels=labels,
        guidance=config.guidance,
        precision=config.precision,
        format=config.format,
    )
    named = _classes(labels, known.class_names)
    unusual = "" if sampler == choose_levels(denoiser, steps=1)[0] else sampler
    name = default_name(folder, request, unusual, config.sigmas is not None, known.class_names)
    out = Path("samples") / name if config.out is None else Path(os.path.expanduser(config.out))

    calls = 2 * len(levels) - 1 if sampler == "heun" else len(levels)
    say(f"{config.num} images from {folder}, {config.weights} weights, {calls} network call{'s' * (calls > 1)} each")
    if named:
        say(f"of class {named}")
    shape, picture = (known.image_channels, known.image_size, known.image_size), out / "grid.png"
    with claimed(out, request) as whole:
        with writing(out):
            files = open_files(request.format, out, shape, request.seed)
            places = files.missing(config.num)
        if len(places) < config.num:
            say(f"{config.num - len(places)} of {config.num} images are there already")
        if places:
            try:
                _draw(config, request, denoiser, places, lambda batch, images: _write(files, out, batch, images))
            except Stopped:
                # By its checkpoint: what a run's folder means is another one once it has trained on.
                same = shlex.quote(f"ckpt={folder}")
                raise Stopped(
                    f"stopped: what was drawn is kept in {out}, and the command with {same} goes on"
                ) from None
        with writing(out):
            if places or not picture.exists():
                save_whole(grid(files.read(min(whole.num, GRID_IMAGES))), picture, out / ".grid.png.writing")
            files.finish()
    if whole.num > config.num:
        say(f"note: {out} is of a request with num={whole.num}")
    say(f"wrote {picture} and the images beside it" if places else f"nothing to draw; the images are in {out}")


def _write(files: "ImageFiles", out: Path, batch: list[int], images: "Tensor") -> None:
    with writing(out):
        files.add(batch, images)


def _draw(
    config: SampleConfig,
    request: Request,
    denoiser: "Denoiser",
    places: list[int],
    write: Callable[[list[int], "Tensor"], None],
) -> None:
    """Draw the images of `places`, and have them written batch by batch; a signal is heeded at each network call."""
    from ..core.memory import shortage_explained
    from ..core.precision import arithmetic
    from ..core.progress import progress
    from ..core.world import ALONE
    from ..models.compiling import CompiledBlocks
    from ..sampling.generate import generate
    from ..training.compile_policy import compile_alike

    batch_size = min(config.batch_size, len(places))
    fix = f"batch_size={max(1, batch_size // 2)} (now {batch_size})"
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    labels = request.labels

    def draw(batch: list[int], **levels: Any) -> "Tensor":
        return generate(
            denoiser,
            [request.seed + place for place in batch],
            labels=[labels[place] for place in batch] if isinstance(labels, list) else labels,
            guidance=request.guidance,
            batch_size=batch_size,
            precision=request.precision,
            whole_batches=config.compile,
            **levels,
        )

    denoiser.register_forward_pre_hook(lambda *_: heed())
    with shortage_explained(f"drawing {batch_size} images at once", fix), progress(len(places), "sampling") as bar:
        if config.compile:
            blocks = CompiledBlocks(denoiser)
            with arithmetic(config.precision):
                one_call = {"sampler": "multistep", "sigmas": request.sigmas[:1]}
                compile_alike(blocks, lambda: draw(batches[0], **one_call), "true", ALONE, lambda: False)
        for batch in batches:
            write(batch, draw(batch, sampler=config.sampler, steps=config.steps, sigmas=config.sigmas))
            bar.advance(len(batch))


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    known = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if asked not in known:
        raise InputError("no such device here", asked, ", ".join(["auto", *known]))
    return asked


def _sha256(manifest: "Manifest", weights: str) -> str:
    """Of the weights' file; where they are made of snapshots, of the averaged ones', which only this checkpoint has."""
    stem = {"raw": "denoiser"}.get(weights, weights)
    entry = manifest.files.get(f"{stem}.safetensors") or manifest.files[f"{manifest.ema}.safetensors"]
    return entry.sha256


def _classes(labels: int | list[int] | None, names: list[str]) -> str:
    """Names and numbers of the classes that were asked for, as far as they have names."""
    if labels is None or not names:
        return ""
    numbers = list(dict.fromkeys([labels] if isinstance(labels, int) else labels))
    more = f", ... ({len(numbers)} in all)" if len(numbers) > _SHOWN else ""
    return ", ".join(f"{names[n]} ({n})" for n in numbers[:_SHOWN]) + more
