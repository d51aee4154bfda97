"""Whether training and sampling on this device are right: beside the CPU, cut and resumed, without waiting."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from cm_train import generate, load_denoiser
from cm_train.core.precision import arithmetic
from cm_train.data.pixels import to_unit_range
from cm_train.models.backbones.base import blocks_as_written
from cm_train.training.tracking import SilentTracker
from cm_train.training.trainer import Trainer
from gpu_checks.runs import CPU, MODES, Runs, draw_alike, losses
from gpu_checks.table import Scale, Table

# How far one step's gradient may be from the CPU's in float32, as a share of its norm; and the losses of ten steps, as
# a share of the largest. A CPU's own half precision is 0.005 (bf16) and 0.0015 (fp16) off, its losses 0.002 and 0.0004.
GRADIENT = {"float32": 1e-3, "tf32": 0.01, "bfloat16": 0.03, "float16": 0.01}
LOSSES = {"float32": 2e-3, "tf32": 0.01, "bfloat16": 0.03, "float16": 0.01}
# The learning rate at once, so that ten steps go somewhere; tangents whole: scd has no other gradient at its start.
_FAST = ("optimizer.warmup_steps=0",)
_OF_MODE = {"sct": ("objective.tangent_warmup_steps=0",), "scd": ("objective.tangent_warmup_steps=0",)}
# One level: few graphs, for the modes that are compiled last.
_SMALL = ("backbone.channel_mult=[1]", "backbone.attention_resolutions=[]")


def rows(table: Table, scale: Scale) -> None:
    steps = 10 if scale.gpu else 3
    modes = MODES if scale.gpu or scale.full else ("cd", "ict")
    beside = {"large": Beside(scale.home / "large", steps), "small": Beside(scale.home / "small", steps, *_SMALL)}
    large, runs = beside["large"], beside["large"].runs
    for mode in modes:
        table.row(f"{mode} auto, eager", partial(large.compare, mode, "auto"))
    table.row("cd auto, compiled", partial(_compiled, scale, large, "cd"))
    table.row("cut and resumed, compiled", partial(_resumed_compiled, scale, runs))
    for mode in ("cd", "ict"):
        for precision in ("fp32", "tf32", "bf16", "fp16") if scale.gpu else ("bf16",):
            table.row(f"{mode} {precision}", partial(large.compare, mode, precision))
    table.row("a step waits for nothing", partial(_no_waiting, scale, runs))
    table.row("memory stays flat", partial(_flat_memory, scale, runs))
    table.row(f"one rank, {_backend(scale)}", partial(_one_rank, scale, runs))
    table.row("a tangent through attention", partial(_tangent, runs))
    table.row("samplers", partial(_samplers, scale, runs))
    table.row("batch of 64 against 7", partial(_batches, scale, runs))
    table.row("power-function averages", partial(_power, scale, runs))
    table.row("a checkpoint read on the other device", partial(_across, runs))
    table.row("cut and resumed", partial(_resumed, scale, runs))
    table.row("cut and resumed, deterministic", partial(_resumed_deterministic, scale))
    table.row("ict auto, compiled", partial(_compiled, scale, large, "ict"))
    rest = beside["large" if scale.full and scale.gpu else "small"]
    for mode in modes:
        if mode not in ("cd", "ict"):
            table.row(f"{mode} auto, compiled", partial(_compiled, scale, rest, mode))


class Beside:
    """Trainers beside the CPU's in float32, from the same weights and with the same draws.

    Args:
        options: of the network, for all of them.
    """

    def __init__(self, home: Path, steps: int, *options: str):
        home.mkdir(parents=True)
        self.runs, self._steps = Runs(home, *_FAST, *options), steps
        self._wanted: dict[str, tuple[Trainer, torch.Tensor, list[float]]] = {}

    def compare(self, mode: str, precision: str, compiled: str = "false") -> dict[str, Any]:
        """The gradient of one batch, then the losses of some steps."""
        reference, gradient, expected = self._reference(mode)
        with arithmetic(precision):
            options = [f"precision={precision}", f"compile={compiled}", *_OF_MODE.get(mode, ())]
            trainer = self.runs.trainer(self.runs.config(mode, *options))
            trainer.state.loss_scale.factor.clamp_(
                max=2.0**10
            )  # its search for the largest one takes hundreds of steps
            draw_alike(trainer, reference)
            graphs = counters["stats"]["unique_graphs"]
            off = _apart(_gradient(trainer), gradient)
            found = losses(trainer, self._steps)
            if trainer.blocks is not None:
                unserved = trainer.blocks.meet(trainer.try_out)
                made = counters["stats"]["unique_graphs"] - graphs
                assert unserved == made == 0, f"{unserved} kinds of calls had no graph, {made} were made in training"
        kind = "tf32" if precision == "tf32" else str(trainer.autocast or torch.float32).removeprefix("torch.")
        losses_off = _largest(found, expected)
        assert off < GRADIENT[kind], f"the gradient is off by {off:.2g} in {kind}"
        assert losses_off < LOSSES[kind], f"losses are off by {losses_off:.2g} in {kind}: {found} instead of {expected}"
        skipped = int(trainer.state.skipped)
        return {"type": kind, "gradient_off": off, "losses_off": losses_off, "skipped_steps": skipped}

    def _reference(self, mode: str) -> tuple[Trainer, torch.Tensor, list[float]]:
        """The CPU's trainer, the gradient of its first batch, and the losses of its steps; made once."""
        if mode not in self._wanted:
            options = ["precision=fp32", "compile=false", *_OF_MODE.get(mode, ())]
            with arithmetic("fp32"):
                trainer = self.runs.trainer(self.runs.config(mode, *options), on_gpu=False)
                self._wanted[mode] = trainer, _gradient(trainer), losses(trainer, self._steps)
        return self._wanted[mode]


def _gradient(trainer: Trainer) -> torch.Tensor:
    """Of the first batch, on the CPU; nothing else moves."""
    [(rows, images, labels)] = trainer.fetch()
    trainer.state.gradient.zero_()
    trainer._backward(trainer.objective.draw(to_unit_range(images), labels, 0, rows), last=True)
    return (trainer.state.gradient / trainer.state.loss_scale.factor).cpu()


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def _largest(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / max(map(abs, wanted))


def _compiled(scale: Scale, beside: Beside, mode: str) -> dict[str, Any]:
    scale.needs_compiler()
    return beside.compare(mode, "auto", "true")


def _no_waiting(scale: Scale, runs: Runs) -> dict[str, Any]:
    """No step waits for the device: the host runs ahead, or the device starves."""
    scale.needs_gpu()
    for mode in MODES:
        trainer = runs.trainer(runs.config(mode, "compile=false"))
        losses(trainer, 2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                trainer.train_step(trainer.fetch())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"modes": " ".join(MODES)}


def _flat_memory(scale: Scale, runs: Runs) -> dict[str, Any]:
    scale.needs_gpu()
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


def _one_rank(scale: Scale, runs: Runs) -> dict[str, Any]:
    """Gradients through the data-parallel wrapper and the GPUs' own library are those without."""
    plain, wrapped = (runs.trainer(runs.config("cd", "compile=false")) for _ in range(2))
    dist.init_process_group(_backend(scale), store=dist.HashStore(), rank=0, world_size=1)
    try:
        one = torch.ones(3, device=scale.device)
        dist.all_reduce(one)
        assert one.tolist() == [1, 1, 1]
        ids = [0] if scale.gpu else None
        wrapped.model = DistributedDataParallel(wrapped.objective, device_ids=ids, broadcast_buffers=False)
        found, wanted = losses(wrapped, 3), losses(plain, 3)
        wrapped.model = None
    finally:
        dist.destroy_process_group()
    off = _largest(found, wanted)
    assert off < 1e-3, f"losses {found} instead of {wanted}"
    return {"losses_off": off}


def _backend(scale: Scale) -> str:
    return "nccl" if scale.gpu else "gloo"


def _tangent(runs: Runs) -> dict[str, Any]:
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


def _samplers(scale: Scale, runs: Runs) -> dict[str, Any]:
    found = {}
    for sampler, steps in (("onestep", 1), ("multistep", 3), ("euler", 6), ("heun", 6)):
        images = [generate(_loaded(runs, d), range(16), sampler=sampler, steps=steps) for d in (scale.device, CPU)]
        found[sampler] = _grey_levels(*images)
    assert max(found.values()) <= 1, f"grey levels apart: {found}"
    return found


def _batches(scale: Scale, runs: Runs) -> dict[str, Any]:
    denoiser = _loaded(runs, scale.device)
    one, other = (generate(denoiser, range(64), sampler="onestep", batch_size=size) for size in (64, 7))
    apart = _grey_levels(one, other)
    assert apart <= 1, f"{apart} grey levels apart"
    return {"grey_levels": apart, "pixels": (one != other).float().mean().item()}


def _power(scale: Scale, runs: Runs) -> dict[str, Any]:
    options = ["ema=power", "ema.power=[0.05,0.1]", "steps=8", "ema.num_snapshots=4", "compile=false"]
    config = runs.config("edm", *options)
    trainer = runs.trainer(config)
    trainer.run(SilentTracker())
    wanted, found = (load_denoiser(config.folder, "power_0.07", device) for device in (CPU, scale.device))
    for a, b in zip(wanted.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b.cpu()), "made otherwise on this device"
    return {}


def _across(runs: Runs) -> dict[str, Any]:
    """Trained here, read and trained on the CPU, and read here again."""
    name = "across"
    options = ["compile=false", "precision=fp32", "schedule_steps=6"]  # by which the average's decay is settled
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


def _resumed(scale: Scale, runs: Runs) -> dict[str, Any]:
    """Stopped half-way and built anew from its folder; on a CPU to the bit."""
    with arithmetic("auto"):
        return _cut(runs, 8, not scale.gpu, ("compile=false", "steps=8"))


def _resumed_deterministic(scale: Scale) -> dict[str, Any]:
    """To the bit on a GPU too, on a network that showed differences without; how many weights differ so is told."""
    (home := scale.home / "deterministic").mkdir()
    network = ("backbone=unet_m", "precision=fp32") if scale.gpu else ("precision=fp32",)
    runs, options = Runs(home, *network), ("compile=false", "steps=6")
    with arithmetic("fp32", deterministic=True):
        values = _cut(runs, 6, True, (*options, "deterministic=true"))
    with arithmetic("fp32"):
        values["differ_without"] = _cut(runs, 6, False, options)["weights_that_differ"]
    return values


def _resumed_compiled(scale: Scale, runs: Runs) -> dict[str, Any]:
    scale.needs_compiler()
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
    off = _apart(rest.state.weights, whole.state.weights)
    assert differ == 0 or not exact, f"{differ} weights differ, by {off:.2g}"
    assert off < 1e-4, f"the weights are {off:.2g} apart"
    return {"weights_that_differ": differ, "off": off}


def _loaded(runs: Runs, device: torch.device | str) -> Any:
    return load_denoiser(runs.start, device=device)


def _grey_levels(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())
