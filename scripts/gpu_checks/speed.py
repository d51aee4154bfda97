"""What a training step costs, compiled and not: beside its floor, the card's peak and the memory that must be held."""

import gc
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bench
import torch
from torch._inductor.codecache import PyCodeCache

from cm_train.core.precision import arithmetic
from cm_train.models.denoiser import forward_flops
from cm_train.training.trainer import Trainer
from gpu_checks.table import Scale, Table

_UNET = (
    "attention_resolutions: {at}, head_channels: {head}, group_channels: {groups}, dropout: 0.0, scale_shift: true, "
)
_UNET += "resample_in_block: true, noise_multiplier: 1.0}}"
SIZES: dict[str, dict[str, Any]] = {
    "61 M, 32x32": {
        "image_size": 32,
        "batch_size": 128,
        "backbone": "{name: unet, channels: 128, channel_mult: [2, 2, 2], num_blocks: 4, "
        + _UNET.format(at=[16], head=64, groups="null"),
    },
    "295 M, 64x64": {
        "image_size": 64,
        "batch_size": 48,
        "backbone": "{name: unet, channels: 192, channel_mult: [1, 2, 3, 4], num_blocks: 3, "
        + _UNET.format(at=[32, 16, 8], head=64, groups="null"),
    },
    "0.1 M, 8x8": {
        "image_size": 8,
        "batch_size": 16,
        "backbone": "{name: unet, channels: 16, channel_mult: [1], num_blocks: 1, "
        + _UNET.format(at="[]", head=16, groups=4),
    },
}
_PASSES = {"cd": 6, "ict": 4}  # forward passes that a step's arithmetic is worth; a backward one counts two


def rows(table: Table, scale: Scale) -> None:
    peak: dict[str, float] = {}  # of the card, in FLOP/s
    table.row("matrix product, bf16", partial(_matrix_product, scale, peak))
    sizes = ["0.1 M, 8x8"] if not scale.gpu else ["61 M, 32x32", *(["295 M, 64x64"] if scale.full else [])]
    for size in sizes:
        for mode in ("cd", "ict"):
            table.row(f"{mode}, {size}, eager", partial(_step, scale, size, mode, "false", peak))
        for mode in ("cd", "ict"):
            table.row(f"{mode}, {size}, compiled", partial(_step, scale, size, mode, "true", peak))


def _matrix_product(scale: Scale, peak: dict[str, float]) -> dict[str, Any]:
    """The fastest that this device multiplies, which shares are of."""
    side = 8192 if scale.gpu else 512
    a, b, out = (torch.randn(side, side, device=scale.device, dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad():
        multiply = partial(torch.mm, a, b, out=out)
        bench.timed(multiply, 5)
        seconds = min(bench.timed(multiply, 10) for _ in range(5))
    peak["flops"] = 2 * side**3 / seconds
    return {"tflops": peak["flops"] / 1e12}


def _step(scale: Scale, size_name: str, mode: str, compiled: str, peak: dict[str, float]) -> dict[str, Any]:
    if compiled == "true":
        scale.needs_compiler()
    size = SIZES[size_name]
    home = scale.home / f"{mode}-{size['image_size']}-{compiled}"
    with arithmetic("auto"), _caches_in(scale.home / f"cache-{mode}-{size['image_size']}"):
        return _measured(scale, size, mode, compiled, peak, home)


@contextmanager
def _caches_in(folder: Path) -> Iterator[None]:
    """The compiler's caches in an empty folder of their own; torch tells Triton's in the environment, once."""
    before = {name: os.environ.pop(name, None) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _measured(
    scale: Scale, size: dict[str, Any], mode: str, compiled: str, peak: dict[str, float], home: Path
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    _forget()
    trainer, values["start_s"] = _started(size, home / "cold", mode, compiled)
    if compiled == "true":
        del trainer
        _forget()
        trainer, values["start_warm_s"] = _started(size, home / "warm", mode, compiled)
    parameters = [*trainer.objective.denoiser.parameters()]
    views = [p.grad for p in parameters]
    passes = bench.floor_step(trainer)

    def floor() -> None:
        for p in parameters:
            p.grad = None
        passes()

    def step() -> None:
        for p, view in zip(parameters, views, strict=True):
            p.grad = view
        trainer.train_step(trainer.fetch())

    per_block, blocks = (4, 5) if scale.gpu else (1, 2)
    bench.timed(floor, 2)
    bench.timed(step, 2)
    floors, steps, peaks = [], [], []
    for _ in range(blocks):
        floors.append(bench.timed(floor, per_block))
        for p in parameters:
            p.grad = None  # what the floor left, and no step has
        if scale.gpu:
            torch.cuda.reset_peak_memory_stats()
        steps.append(bench.timed(step, per_block))
        peaks.append(bench.peak_memory())
    second = statistics.median(steps)
    flops = forward_flops(trainer.objective.denoiser.config, trainer.config.backbone)
    values |= {
        "parameters": trainer.state.weights.numel(),
        "step_ms": 1e3 * second,
        "step_ms_range": [round(1e3 * min(steps), 1), round(1e3 * max(steps), 1)],
        "floor_ms": 1e3 * statistics.median(floors),
        "step_over_floor": statistics.median(s / f for s, f in zip(steps, floors, strict=True)),
        "images_per_s": size["batch_size"] / second,
        "gflops_an_image": flops / 1e9,
        "peak_gib": max(peaks),
        "held_gib": bench.held_gib(trainer),
    }
    if "flops" in peak:
        values["share_of_peak"] = _PASSES[mode] * flops * size["batch_size"] / second / peak["flops"]
    return values


def _forget() -> None:
    """Free what earlier rows held, and forget their compiled code but for what is on the disk."""
    torch._dynamo.reset()
    PyCodeCache.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _started(size: dict[str, Any], home: Path, mode: str, compiled: str) -> tuple[Trainer, float]:
    """A trainer that has made its first step, and the seconds from its being built to that, the compiler's included."""
    trainer = bench.make_trainer(size, home, "auto", mode, compiled)
    began = time.perf_counter()
    trainer.prepare()
    bench.timed(lambda: trainer.train_step(trainer.fetch()), 1)
    return trainer, time.perf_counter() - began
