"""Whether training and sampling on this device are right: beside the CPU, cut and resumed, without waiting."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cm_train import checkpoint, generate, launching, load_denoiser, run_folder
from cm_train.backbones.base import blocks_as_written
from cm_train.config import dump
from cm_train.precision import arithmetic
from cm_train.signals import StopFlag
from cm_train.tracking import SilentTracker
from cm_train.trainer import Trainer
from gpu_checks.runs import CPU, MODES, Runs, draw_alike, losses, worst
from gpu_checks.table import Scale, Skipped, Table

# The largest relative difference of a loss from the CPU's in float32, over ten steps of training.
TOLERANCE = {"fp32": 2e-3, "tf32": 3e-2, "bf16": 0.15, "fp16": 0.05, "auto": 0.15}


def rows(table: Table, scale: Scale) -> None:
    runs = Runs(scale.home)
    steps = 10 if scale.gpu else 2
    modes = MODES if scale.gpu or scale.full else ("cd", "ict")
    wanted = {mode: partial(_wanted, runs, mode, steps, {}) for mode in modes}
    for mode in modes:
        table.row(f"{mode} auto, eager", partial(_losses, runs, mode, "auto", "false", wanted[mode], steps))
    for mode in ("cd", "ict"):
        for precision in ("fp32", "tf32", "bf16", "fp16") if scale.gpu else ("bf16",):
            table.row(f"{mode} {precision}", partial(_losses, runs, mode, precision, "false", wanted[mode], steps))
    table.row("a step waits for nothing", partial(_no_waiting, runs, scale))
    table.row("memory stays flat", partial(_flat_memory, runs, scale))
    table.row("one rank, nccl" if scale.gpu else "one rank, gloo", partial(_one_rank, runs))
    table.row("a tangent through attention", partial(_tangent, runs, scale))
    table.row("samplers", partial(_samplers, runs, scale))
    table.row("batch of 64 against 7", partial(_batches, runs, scale))
    table.row("power-function averages", partial(_power, runs, scale))
    table.row("a checkpoint read on the other device", partial(_across, runs, scale))
    table.row("cut and resumed", partial(_resumed, runs, scale, "deterministic=false"))
    table.row("cut and resumed, deterministic", partial(_resumed, runs, scale, "deterministic=true"))
    for mode in modes:
        table.row(f"{mode} auto, compiled", partial(_compiled, scale, runs, mode, wanted[mode], steps))
    table.row("cut and resumed, compiled", partial(_resumed_compiled, runs, scale))


def _wanted(runs: Runs, mode: str, steps: int, known: dict[str, Any]) -> tuple[Trainer, list[float]]:
    """A trainer on the CPU in float32 whose draws the others take, and the losses of its first steps; made once."""
    if not known:
        trainer = runs.trainer(runs.config(mode, "precision=fp32", "compile=false"), on_gpu=False)
        known |= {"trainer": trainer, "losses": losses(trainer, steps)}
    return known["trainer"], known["losses"]


def _losses(
    runs: Runs, mode: str, precision: str, compiled: str, wanted: Callable[[], Any], steps: int
) -> dict[str, Any]:
    reference, expected = wanted()
    with arithmetic(precision):
        trainer = runs.trainer(runs.config(mode, f"precision={precision}", f"compile={compiled}"))
        draw_alike(trainer, reference)
        found = losses(trainer, steps)
    off = worst(found, expected)
    assert all(map(math.isfinite, found)), f"losses {found}"
    assert off < TOLERANCE[precision], f"losses off by {off:.2g}: {found} instead of {expected}"
    arithmetic_type = str(trainer.autocast or torch.float32).removeprefix("torch.")
    return {"type": arithmetic_type, "off": off, "skipped_steps": int(trainer.state.skipped), "last_loss": found[-1]}


def _compiled(scale: Scale, runs: Runs, mode: str, wanted: Callable[[], Any], steps: int) -> dict[str, Any]:
    _needs_compiler(scale)
    return _losses(runs, mode, "auto", "true", wanted, steps)


def _needs_compiler(scale: Scale) -> None:
    if not scale.compiled:
        raise Skipped("without the compiler, as --cpu is")


def _no_waiting(runs: Runs, scale: Scale) -> dict[str, Any]:
    """No step waits for the device: the host runs ahead, or the device starves."""
    _needs_gpu(scale)
    checked = []
    for mode in MODES:
        trainer = runs.trainer(runs.config(mode, "compile=false"))
        losses(trainer, 2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                trainer.train_step(trainer.fetch())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        checked.append(mode)
    return {"modes": " ".join(checked)}


def _needs_gpu(scale: Scale) -> None:
    if not scale.gpu:
        raise Skipped("is about a GPU")


def _flat_memory(runs: Runs, scale: Scale) -> dict[str, Any]:
    _needs_gpu(scale)
    trainer = runs.trainer(runs.config("cd", "compile=false", "objective.target_decay=0.9"))
    losses(trainer, 10)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses(trainer, 10)
    peak = torch.cuda.max_memory_allocated()
    for _ in range(200):
        trainer.train_step(trainer.fetch())
    trainer.state.window.close(trainer.world)
    grown = torch.cuda.memory_allocated() - before
    grown_peak = torch.cuda.max_memory_allocated() - peak
    assert grown <= 2**16, f"{grown} bytes more after 200 steps"
    assert grown_peak <= 2**20, f"the peak grew by {grown_peak} bytes"
    return {"grown_bytes": grown, "peak_grown_bytes": grown_peak}


def _one_rank(runs: Runs) -> dict[str, Any]:
    config = runs.config("ict", "steps=3", "compile=false")
    config.folder.mkdir()
    run_folder.store_config(config.folder, dump(config))
    with StopFlag() as stop:
        code, words = launching.launch(1, "cm_train.worker", str(config.folder), stop)
    assert code == 0, words
    newest = checkpoint.newest_manifest(config.folder)
    assert newest is not None and newest.finished
    return {"steps": newest.step}


def _tangent(runs: Runs, scale: Scale) -> dict[str, Any]:
    """The derivative that sCM needs, through attention and norms, here in float32 and on the CPU in float64."""
    trainer = runs.trainer(runs.config("sct", "compile=false"))
    backbone = trainer.objective.denoiser.backbone
    x, direction = (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    c = torch.linspace(-1, 1, 4)

    def derivative(network: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        point, along = [t.to(device, dtype) for t in (x, c)], [t.to(device, dtype) for t in (direction, c)]
        kernel = torch.nn.attention.SDPBackend.MATH
        with torch.no_grad(), blocks_as_written(), torch.nn.attention.sdpa_kernel(kernel):
            return torch.func.jvp(network, tuple(point), tuple(along))[1].double().cpu()

    with arithmetic("fp32"):
        found = derivative(backbone, trainer.device, torch.float32)
    exact = derivative(load_denoiser(runs.start).double().backbone, CPU, torch.float64)
    off = ((found - exact).norm() / exact.norm()).item()
    assert off < 1e-4, f"off by {off:.2g}"
    return {"off": off}


def _samplers(runs: Runs, scale: Scale) -> dict[str, Any]:
    found = {}
    for sampler, steps in (("onestep", 1), ("multistep", 3), ("euler", 6), ("heun", 6)):
        images = [generate(_loaded(runs, d), range(16), sampler=sampler, steps=steps) for d in (_device(scale), CPU)]
        found[sampler] = _grey_levels(*images)
    assert max(found.values()) <= 1, f"grey levels apart: {found}"
    return found


def _batches(runs: Runs, scale: Scale) -> dict[str, Any]:
    denoiser = _loaded(runs, _device(scale))
    one, other = (generate(denoiser, range(64), sampler="onestep", batch_size=size) for size in (64, 7))
    apart = _grey_levels(one, other)
    assert apart <= 1, f"{apart} grey levels apart"
    return {"grey_levels": apart, "pixels": (one != other).float().mean().item()}


def _power(runs: Runs, scale: Scale) -> dict[str, Any]:
    options = ["ema=power", "ema.power=[0.05,0.1]", "steps=8", "ema.num_snapshots=4", "compile=false"]
    config = runs.config("edm", *options)
    trainer = runs.trainer(config)
    trainer.run(SilentTracker())
    wanted, found = (load_denoiser(config.folder, "power_0.07", device) for device in (CPU, _device(scale)))
    for a, b in zip(wanted.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b.cpu()), "made otherwise on this device"
    return {}


def _across(runs: Runs, scale: Scale) -> dict[str, Any]:
    """Trained here, read and trained on the CPU, and read here again."""
    name = "across"
    options = ["compile=false", "precision=fp32"]
    here = runs.trainer(runs.config("cd", *options, "steps=2", name=name))
    here.run(SilentTracker())
    there = runs.trainer(runs.config("cd", *options, "steps=4", name=name), on_gpu=False)
    assert there.step == 2
    assert torch.equal(there.state.weights, here.state.weights.cpu())
    there.run(SilentTracker())
    back = runs.trainer(runs.config("cd", *options, "steps=6", name=name))
    assert back.step == 4
    assert torch.equal(back.state.weights.cpu(), there.state.weights)
    return {}


def _resumed(runs: Runs, scale: Scale, *options: str) -> dict[str, Any]:
    """Stopped half-way and built anew from its folder; bits are promised on a CPU and where deterministic."""
    steps, exact = 8, not scale.gpu or "deterministic=true" in options
    options = ("compile=false", *options, f"steps={steps}")
    with arithmetic("auto", deterministic="deterministic=true" in options):
        return _cut(runs, steps, exact, options)


def _resumed_compiled(runs: Runs, scale: Scale) -> dict[str, Any]:
    _needs_compiler(scale)
    with arithmetic("auto"):
        return _cut(runs, 8, not scale.gpu, ("compile=true", "steps=8"))


def _cut(runs: Runs, steps: int, exact: bool, options: tuple[str, ...]) -> dict[str, Any]:
    whole = runs.trainer(runs.config("cd", *options))
    whole.run(SilentTracker())
    name = f"cut-{len(list(runs.home.iterdir()))}"
    first = runs.trainer(runs.config("cd", *options, name=name))
    first.should_stop = lambda reserve_s: first.step >= steps // 2
    assert not first.run(SilentTracker())
    rest = runs.trainer(runs.config("cd", *options, name=name))
    assert rest.step == steps // 2
    rest.run(SilentTracker())
    differ = int((rest.state.weights != whole.state.weights).sum())
    off = ((rest.state.weights - whole.state.weights).norm() / whole.state.weights.norm()).item()
    assert differ == 0 or not exact, f"{differ} weights differ, by {off:.2g}"
    assert off < 1e-4, f"the weights are {off:.2g} apart"
    return {"weights_that_differ": differ, "off": off}


def _device(scale: Scale) -> torch.device:
    return torch.device("cuda" if scale.gpu else "cpu")


def _loaded(runs: Runs, device: torch.device) -> Any:
    return load_denoiser(runs.start, device=device)


def _grey_levels(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())
