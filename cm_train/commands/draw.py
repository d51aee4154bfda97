"""What cm-sample does: images from a checkpoint, into a folder that is one request's."""

import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from .. import __version__
from ..core.errors import ExitCode, InputError
from ..core.settings import typed
from ..core.signals import StopFlag, Stopped
from .device import device_for
from .sample_config import USUAL_BATCH, RedrawConfig, SampleConfig
from .sample_folder import REQUEST, SHARES, Request, claimed, default_name, writing

if TYPE_CHECKING:
    from .draw_batches import Job
    from .sample_files import ImageFiles

GRID, GRID_IMAGES = "grid.png", 100


def sample(cfg: DictConfig, stop: StopFlag | None = None) -> ExitCode:
    """The command on its composed config; its exit code.

    Args:
        stop: which hears of signals, and has processes that draw hear of them too.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    values = {str(key): None if value == "???" else value for key, value in values.items()}
    from ..core import plugins

    plugins.load(plugins.names_in(values))  # before the config is typed, which may name a sampler of theirs
    try:
        if values["from"] is not None:
            from .redraw import redraw

            return redraw(_of_redrawing(values))
        del values["from"]
        if values["ckpt"] is None:
            raise InputError("no checkpoint given", fix="cm-sample runs/<name>")
        _sample(typed(SampleConfig, values, as_written=True), stop or StopFlag())
    except Stopped as stopped:
        from ..core.terminal import say

        say(str(stopped) or "stopped before the first image")
        return ExitCode.STOPPED
    return ExitCode.DONE


def _of_redrawing(values: dict[str, Any]) -> RedrawConfig:
    """The keys of cm-sample from=...; raises InputError where others are set beside them."""
    from ..core.configs import conf_dir

    usual: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "sample.yaml"))
    own = ("from", "ckpt", "out", "device", "plugins")
    for key, value in values.items():
        if key not in own and value != usual.get(key):
            raise InputError(f"from= takes {key} from the picture", f"{key}={value}", fix=f"drop {key}=")
    return typed(RedrawConfig, {key: values[key] for key in own}, as_written=True)


def _sample(config: SampleConfig, stop: StopFlag) -> None:
    from ..core.terminal import say
    from .sample_files import open_files

    job = _prepare(config)
    out, num = job.out, job.request.num
    _announce(job)
    with claimed(out, job.request, USUAL_BATCH) as whole:
        job = replace(job, request=whole)
        with writing(out):
            files = open_files(whole, out, job.denoiser.config)
            batches = whole.unfinished(files.missing(num))
        drawn = [place for batch in batches for place in batch]
        there = num - sum(place < num for place in drawn)
        if there:
            say(f"{there} of {num} images are there already")
        if batches:
            try:
                _draw(config, job, files, batches, stop)
            except Stopped:
                # By its checkpoint: what a run's folder means is another one once it has trained on.
                again = f"the command with {shlex.quote(f'ckpt={job.checkpoint}')} goes on"
                raise Stopped(f"stopped: what was drawn is kept in {out}, and {again}") from None
        _finish(job, files, bool(batches))
    if whole.num > num:
        say(f"note: {out} is of a request with num={whole.num}")
    if not batches:
        say(f"nothing to draw; the images are in {out}")
        return
    say(f"wrote to {out}:")
    say(f"  {files.names(drawn)} ({len(drawn)}{' new' if there else ''} image{'s' * (len(drawn) > 1)})")
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

    device = device_for(config.device)
    seed, num = config.first_and_count()
    if num_processes(config.devices, device) > 1 and num > (config.batch_size or USUAL_BATCH):
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
        num=num,
        seed=seed,
        sampler=name,
        sigmas=choose_levels(sampler, known, config.steps, config.sigmas),
        labels=None if config.labels is None else class_numbers(config.labels, num, known),
        guidance=config.guidance,
        precision=config.precision,
        format=config.format,
        batch_size=config.batch_size,
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


def _draw(config: SampleConfig, job: "Job", files: "ImageFiles", batches: list[range], stop: StopFlag) -> None:
    """Draw these batches: here, or by several processes where there are enough for them."""
    from ..core.progress import progress
    from ..core.terminal import say
    from .draw_batches import draw
    from .draw_shares import Order, draw_in_shares, num_processes

    device, size = device_for(config.device), max(map(len, batches))
    total = sum(map(len, batches))
    wanted = num_processes(config.devices, device)
    num = min(wanted, len(batches))
    if num < wanted and config.devices != "auto":
        smaller = max(1, total // wanted)
        say(f"note: batches of {size} leave {wanted - num} of {wanted} processes idle; fix: batch_size={smaller}")
    if num > 1:
        order = Order(
            request=job.request,
            checkpoint=str(job.checkpoint),
            on_gpus=device != "cpu",
            batches=[[batch.start, batch.stop] for batch in batches],
            compile=config.compile,
        )
        draw_in_shares(num, order, job.out, stop)
        return
    job.denoiser.to(device)
    with progress(total, "sampling") as bar:
        draw(job, files, batches, config.compile, bar.advance)


def _finish(job: "Job", files: "ImageFiles", has_new: bool) -> None:
    """Make the grid of what was asked for altogether, and whatever else comes last."""
    from ..data.pixels import grid
    from ..sampling.by_hand import captions
    from .sample_files import save_whole

    picture, whole, seed = job.out / GRID, job.request, job.request.seed
    with writing(job.out):
        if has_new or not picture.exists():
            images = files.read(min(whole.num, GRID_IMAGES))
            words = captions(job.denoiser, range(seed, seed + len(images)), whole.classes(len(images)))
            save_whole(grid(images, captions=words), picture, job.out / f".{GRID}.writing")
        files.finish()
    shutil.rmtree(job.out / SHARES, ignore_errors=True)  # of a command that was killed
