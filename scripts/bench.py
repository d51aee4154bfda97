"""What training and sampling cost above their floors, and what a checkpoint costs training, measured in one run.

    python scripts/bench.py train                    7.7 M parameters at 32x32, batch 16
    python scripts/bench.py train --size small       1.2 M parameters at 8x8, batch 128
    python scripts/bench.py save                     how long a save stalls training
    python scripts/bench.py sample                   which share of cm-sample's time its network takes

The floor of a consistency-distillation step is the arithmetic that no implementation can leave out: student forward
and backward, target forward and the teacher's two forwards of a Heun step, on the same batch in the same precision.
The step is the trainer's whole one: data, noise, those passes, optimizer, target, three EMAs, metrics and log lines.
Both are timed in turn, block by block, and the ratio is taken pair by pair, since a machine's speed drifts.

A save stalls training while weights, averages and optimizer are copied off the device. That is compared with the copy
alone, and with the whole write to disk, hashes and fsync included, that goes on beside training.

cm-sample with one network call an image, once its checkpoint is loaded, to the last file that it writes: the share of
that time that passes within network calls, and the share that as many calls take alone, which nobody writes beside.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from cm_train.commands import draw
from cm_train.core import configs
from cm_train.core.precision import arithmetic
from cm_train.core.terminal import silence
from cm_train.models.backbones.base import BackboneConfig
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints import write as saving
from cm_train.models.checkpoints.host_memory import HostMemory
from cm_train.models.denoiser import Denoiser, DenoiserConfig, build_denoiser
from cm_train.runs import build
from cm_train.runs.config import parse
from cm_train.training.saver import RunSaver
from cm_train.training.tracking import Tracker
from cm_train.training.trainer import Trainer

SIZES: dict[str, dict[str, Any]] = {
    "large": {
        "image_size": 32,
        "batch_size": 16,
        "backbone": "{name: unet, channels: 64, channel_mult: [1, 2, 2], num_blocks: 2, attention_resolutions: [8], "
        "head_channels: 64, group_channels: null, dropout: 0.0, scale_shift: true, resample_in_block: true, "
        "noise_multiplier: 1.0}",
    },
    "small": {
        "image_size": 8,
        "batch_size": 128,
        "backbone": "{name: unet, channels: 40, channel_mult: [1, 2], num_blocks: 1, attention_resolutions: [4], "
        "head_channels: 40, group_channels: 4, dropout: 0.0, scale_shift: true, resample_in_block: true, "
        "noise_multiplier: 1.0}",
    },
}


def make_data(folder: Path, size: int) -> Path:
    """A folder of random colour (or, at 8 pixels, grey) pictures."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for i in range(256):
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def make_teacher(folder: Path, config, channels: int, image_size: int) -> Path:
    """A teacher with random weights: its quality does not matter to its speed."""
    denoiser = build_denoiser(
        DenoiserConfig(
            kind="diffusion",
            boundary="zero",
            image_size=image_size,
            image_channels=channels,
            sigma_data=0.5,
            sigma_min=0.002,
            sigma_max=80.0,
        ),
        config.backbone,
    )
    return store(folder, denoiser, config.backbone)


def store(folder: Path, denoiser: Denoiser, backbone: BackboneConfig) -> Path:
    """A run's folder with `denoiser` as its one checkpoint, for others to learn or start from."""
    saving.write(
        checkpoint.step_folder(folder, 1),
        dict.fromkeys(("denoiser", "ema_0.9"), denoiser.state_dict()),
        {},
        step=1,
        finished=True,
        ema="ema_0.9",
        denoiser=denoiser.config,
        backbone=backbone,
        provenance={},
    )
    return folder


def make_trainer(size: dict, home: Path, precision: str, mode: str = "cd", compiled: str = "false") -> Trainer:
    """A run of `size` on random pictures, ready for its first step; `home` is made where it is not there."""
    channels = 1 if size["image_size"] == 8 else 3
    (home / "data").mkdir(parents=True)
    data = make_data(home / "data", size["image_size"])
    taught = ["teacher=filled-in-below", "objective.target_decay=0.95"] if mode == "cd" else []
    with initialize_config_dir(str(configs.conf_dir()), version_base=None):
        cfg = compose(
            "train",
            overrides=[
                f"mode={mode}",
                "dataset=image_folder",
                f"dataset.root={data}",
                f"dataset.image_size={size['image_size']}",
                f"dataset.channels={channels}",
                f"++backbone={size['backbone']}",
                f"batch_size={size['batch_size']}",
                f"precision={precision}",
                f"compile={compiled}",
                "ema.decay=0.999",
                "ema.half_life_images=null",
                "ema.extra=[0.9999,0.99995]",
                "log_every=10",
                "tracking=none",
                f"run_dir={home / 'run'}",
                *taught,
            ],
        )
    config = parse(cfg)
    if config.needs_teacher():
        teacher = make_teacher(home / "teacher", config, channels, size["image_size"])
        config = config.model_copy(update={"teacher": str(teacher)})
    config.folder.mkdir()
    return build.build_trainer(config)


def floor_step(trainer: Trainer) -> Callable[[], None]:
    """The five passes of cd (three without a teacher) on one fixed batch, nothing else."""
    objective: Any = trainer.objective
    size = trainer.config.batch_size
    images, _ = trainer.loader.batch_at(0, range(size))
    x = images.float().to(trainer.device)
    sigma = torch.linspace(0.1, 10, size, device=trainer.device)
    student, teacher = objective.denoiser, objective.teacher
    target = student if objective.target is None else objective.target

    def passes() -> None:
        with torch.autocast(trainer.device.type, dtype=trainer.autocast, enabled=trainer.autocast is not None):
            denoised = student(x, sigma)
            with torch.no_grad():
                if teacher is not None:
                    teacher(x, sigma)
                    teacher(x, sigma)
                target(x, sigma)
        denoised.square().sum().backward()
        for parameter in student.parameters():
            parameter.grad = None

    return passes


def timed(function: Callable[[], object], count: int) -> float:
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    for _ in range(count):
        function()
    synchronise()
    return (time.perf_counter() - start) / count


def peak_memory() -> float:
    """GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def held_gib(trainer: Trainer) -> float:
    """GiB that must be held: weights, gradient, Adam's two moments, averages, target and teacher."""
    objective: Any = trainer.objective
    others = sum(network is not None for network in (objective.target, objective.teacher))
    return trainer.state.weights.numel() * 4 * (1 + 1 + 2 + len(trainer.state.averages) + others) / 2**30


def train(size_name: str, blocks: int, precision: str) -> None:
    size = SIZES[size_name]
    per_block = 2 if size_name == "large" else 10
    with tempfile.TemporaryDirectory() as home:
        before = peak_memory()
        trainer = make_trainer(size, Path(home), precision)
        with Tracker(trainer.config.tracking, trainer.config.folder, "bench", {}, 0, trainer.config.steps) as tracker:
            parameters = trainer.state.weights.numel()
            passes = floor_step(trainer)
            views = [p.grad for p in trainer.objective.denoiser.parameters()]

            def step() -> None:
                trainer.train_step(trainer.fetch())
                if trainer.step % trainer.config.log_every == 0:
                    trainer._log(tracker, draws=False, measures=False)

            def floor() -> None:
                for parameter in trainer.objective.denoiser.parameters():
                    parameter.grad = None
                passes()

            floors, steps = [], []
            for block in range(blocks + 1):
                f = timed(floor, per_block)
                for parameter, view in zip(trainer.objective.denoiser.parameters(), views, strict=True):
                    parameter.grad = view
                s = timed(step, per_block)
                if block:  # the first one warms up
                    floors.append(f)
                    steps.append(s)
            ratios = [s / f for s, f in zip(steps, floors, strict=True)]
            held = held_gib(trainer)
            print(f"{parameters:,} parameters, {size['image_size']} pixels, batch {size['batch_size']}, {precision}")
            print(f"floor {1e3 * statistics.median(floors):.1f} ms   step {1e3 * statistics.median(steps):.1f} ms")
            print(
                f"step / floor: median {statistics.median(ratios):.3f}  min {min(ratios):.3f}  max {max(ratios):.3f}"
                f"  over {blocks} pairs of {per_block}"
            )
            print(f"{size['batch_size'] / statistics.median(steps):.0f} images/s")
            print(f"peak memory {peak_memory():.2f} GiB ({before:.2f} before), of which must be held {held:.2f} GiB")


def save(size_name: str, rounds: int, precision: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        trainer = make_trainer(SIZES[size_name], Path(home), precision)
        saver = RunSaver(trainer.config, trainer.state, {}, trainer.versions, trainer.world)
        trainer.train_step(trainer.fetch())
        networks = trainer.state.networks()
        tree = {"weights": networks, "state": trainer.state.other_tensors()}
        memory = HostMemory()
        stalls, copies, writes = [], [], []
        for _ in range(rounds + 1):
            trainer.state.step += 1
            stalls.append(timed(lambda: saver.save(must=False), 1))
            writes.append(timed(saver.wait, 1))
            copies.append(timed(lambda: memory.copy(tree), 1))
        pairs = list(zip(stalls, copies, writes, strict=True))[1:]  # the first one warms up
        print(f"{trainer.state.weights.numel():,} parameters, {len(networks)} sets of weights, {rounds} saves")
        print(
            f"stall / copy: median {statistics.median(s / c for s, c, _ in pairs):.2f}   "
            f"stall / (stall + write): median {statistics.median(s / (s + w) for s, _, w in pairs):.3f}"
        )
        print(
            f"stall {1e3 * statistics.median(stalls[1:]):.1f} ms   write {1e3 * statistics.median(writes[1:]):.0f} ms"
        )


def sample(size_name: str, blocks: int, precision: str) -> None:
    silence()
    num_batches, most = (2, 64) if size_name == "large" else (4, 256)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        trainer = make_trainer(SIZES[size_name], home, precision, mode="ct")
        denoiser: Any = trainer.objective.denoiser
        run = store(home / "sampled", denoiser, trainer.config.backbone)
        denoiser.requires_grad_(False).eval()
        x = torch.randn(most, *denoiser.config.image_shape, device=trainer.device)
        sigma = torch.full((most,), 80.0, device=trainer.device)

        def floor() -> None:
            with (
                arithmetic(precision),
                torch.autocast(trainer.device.type, dtype=trainer.autocast, enabled=trainer.autocast is not None),
            ):
                denoiser(x, sigma).cpu()

        words = [f"ckpt={run}", f"num={num_batches * most}", f"batch_size={most}", f"precision={precision}"]
        images = num_batches * most
        print(f"{trainer.state.weights.numel():,} parameters, {images} images of {x.shape[-1]} pixels by {most}")
        for file_format in ("npz", "png"):
            totals, insides, floors = [], [], []
            for block in range(blocks + 1):
                f = num_batches * timed(floor, num_batches)
                total, inside = sampled([*words, f"format={file_format}", f"out={home / f'{file_format}-{block}'}"])
                if block:  # the first one warms up
                    totals.append(total)
                    insides.append(inside / total)
                    floors.append(f / total)
            print(
                f"{file_format}: {images / statistics.median(totals):.0f} images/s, in its network median "
                f"{statistics.median(insides):.3f}  min {min(insides):.3f}; the calls alone / all: median "
                f"{statistics.median(floors):.3f}  over {blocks}"
            )


def sampled(words: list[str]) -> tuple[float, float]:
    """Seconds that cm-sample takes once its checkpoint is loaded, and those that pass within network calls."""
    prepare, began, inside = draw._prepare, 0.0, 0.0

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def prepared(config: Any) -> Any:
        def enter(*_: object) -> None:
            nonlocal inside
            inside -= now()

        def leave(*_: object) -> None:
            nonlocal inside
            inside += now()

        nonlocal began
        job = prepare(config)
        job.denoiser.register_forward_pre_hook(enter)
        job.denoiser.register_forward_hook(leave)
        began = now()
        return job

    draw._prepare = prepared
    try:
        with initialize_config_dir(str(configs.conf_dir()), version_base=None):
            draw.sample(compose("sample", overrides=words))
        return now() - began, inside
    finally:
        draw._prepare = prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "save", "sample"])
    parser.add_argument("--size", choices=list(SIZES), default="large")
    parser.add_argument("--blocks", type=int, default=20, help="pairs of measurements (default: 20)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    {"train": train, "save": save, "sample": sample}[args.what](args.size, args.blocks, args.precision)


if __name__ == "__main__":
    main()
