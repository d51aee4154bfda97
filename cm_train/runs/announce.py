"""What cm-train says before and after a run: what, on what, for how long, where; what came of it."""

import os
import shlex
import time

import torch

from ..core.precision import autocast_type, too_close_for_bf16
from ..core.run_layout import METRICS, SAMPLES, TENSORBOARD, step_folder
from ..core.terminal import duration, say
from ..core.world import World
from ..data.datasets.base import Dataset
from ..models.averages import flat_size
from ..models.checkpoints.manifest import Manifest
from ..models.denoiser import Denoiser
from ..training.best import best_checkpoint, chosen_number
from ..training.config import PREFIX, RunConfig
from ..training.tracking import has_wandb_login, last_values
from .suitability import remarks


def header(config: RunConfig) -> float:
    """Say what is about to run; returns the time that `summary` counts from."""
    source = "" if config.teacher is None else f" from teacher {config.teacher}"
    work = f"{config.steps} steps of {config.batch_size} images"
    limit = "" if config.max_hours is None else f", for {config.max_hours:g} hours at most"
    say(f"{config.mode} on {config.data_name or config.dataset.run_name}{source}: {work}{limit}")
    if config.precision == "bf16" and too_close_for_bf16(config.relative_gap):
        say("note: this loss comes to compare what bf16 can't tell apart; precision=fp16 or auto can")
    if config.notice is not None:
        say(f"note: {config.notice}")
    say(f"run folder {config.folder}; tracking: {_tracking(config)}")
    return time.monotonic()


def machine(config: RunConfig, world: World, compiling: str) -> None:
    """Say what the run runs on; for its ranks to say, since asking a GPU for its name takes memory on it."""
    device = world.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    autocast = autocast_type(config.precision, device, config.relative_gap)
    precision = str(autocast or torch.float32).removeprefix("torch.")
    if config.precision == "tf32" and device.type == "cuda":
        precision = "TF32"
    exact = ", deterministic" if config.deterministic else ""
    say(f"on {world.size} process{'es' * (world.size > 1)}, {kind}, {precision}{exact}; {compiling}")


def scale(config: RunConfig, dataset: Dataset, denoiser: Denoiser, memory: str) -> None:
    """Say how large the run is, and what in its settings does not suit the data.

    Args:
        memory: what a step takes, in words.
    """
    num, images = flat_size(denoiser.parameters()), config.steps * config.batch_size
    say(f"network {config.backbone.name}, {num:,} parameters; {images / len(dataset):,.1f} epochs; {memory}")
    labels = dataset.all_labels()
    counts = [] if labels is None else torch.bincount(labels.cpu(), minlength=dataset.num_classes).tolist()
    classes = dict(zip(dataset.class_names, counts, strict=False))
    for remark in remarks(config, len(dataset), dataset.channels * dataset.image_size**2, num, classes):
        say(f"note: {remark}")


def _tracking(config: RunConfig) -> str:
    home = config.folder
    stay = "previews stay here, tracking.previews=true sends them"
    stay = "" if config.sends_pictures or config.preview_every == 0 else stay
    sent = ", with previews" if config.sends_pictures and config.preview_every != 0 else ""
    board = f"TensorBoard, tensorboard --logdir {shlex.quote(str(home / TENSORBOARD))}"
    return {
        "wandb": f"wandb project {config.tracking.project} ({_wandb_mode()}{sent}{stay and f'; {stay}'})",
        "tensorboard": f"{board} ({stay})" if stay else board,
        "none": f"{home / METRICS} only",
    }[config.tracking.backend]


def _wandb_mode() -> str:
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return f"WANDB_MODE={mode}"
    return "online" if has_wandb_login() else "offline without a login"


def summary(config: RunConfig, began: float, finished: bool, before: Manifest | None, newest: Manifest | None) -> None:
    """Say what this command has done since `began`.

    Args:
        before: the run's newest checkpoint at that time; newest: and now.
    """
    if newest is None:
        say("stopped before the first step; the same command starts again")
        return
    home, took = config.folder, time.monotonic() - began
    steps = newest.step - (0 if before is None else before.step)
    say(f"{steps} steps in {duration(took)}{_results(config)}")
    say(f"checkpoint {step_folder(home, newest.step)}")
    if not finished:
        say(f"stopped at step {newest.step} of {config.steps}, everything saved; the same command goes on")
        return
    if config.keep == "best" and (best := best_checkpoint(config)) is not None:
        say(f"the best by {PREFIX}{chosen_number(config)}, {best.value:.4g}: {step_folder(home, best.step)}")
    samples = f"; samples in {home / SAMPLES}" if (home / SAMPLES).is_dir() else ""
    say(f"done{samples}. Next: cm-sample {shlex.quote(f'ckpt={home}')}")


def _results(config: RunConfig) -> str:
    """How it went at the end, as far as it was logged."""
    values = last_values(config.folder / METRICS)
    rate = f", {values['images_per_s']:.0f} images/s" if "images_per_s" in values else ""
    return rate + "".join(f", {name} {values[name]:.4g}" for name in ("loss", "agreement_rms") if name in values)
