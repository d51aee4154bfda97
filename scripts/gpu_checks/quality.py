"""Whether short runs come out well: a diffusion model, and cd and ict beside it, in the device's precision and fp32."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cm_train import generate, load_denoiser
from cm_train.data.pixels import grid, save_png
from cm_train.evaluation.metrics.agreement import agreement
from cm_train.models.checkpoints import read as checkpoint
from cm_train.runs import worker
from cm_train.training.config import RunConfig
from gpu_checks.runs import composed
from gpu_checks.table import Scale, Skipped, Table

_NUM = 256  # images that are compared
# Of the agreement's root mean square between equal runs: three seeds of whole digits runs span 0.011.
_SEED_NOISE = 0.03
_AVERAGE = "ema.decay=0.99", "ema.half_life_images=null"  # whatever the run's length


def rows(table: Table, scale: Scale) -> None:
    teacher_s, student_s = (50.0, 15.0) if scale.gpu else (2.0, 1.0)
    data = ["dataset=digits"]
    if scale.data is not None:
        data = ["dataset=mnist", f"dataset.root={scale.data}", "dataset.download=false"]
    known: dict[str, Any] = {"pictures": []}
    table.row("edm", partial(_teacher, scale, data, teacher_s, known))
    for mode in ("cd", "ict"):
        for precision in ("auto", "fp32"):
            table.row(f"{mode} {precision}", partial(_student, scale, data, mode, precision, student_s, known))
        table.row(f"{mode} auto against fp32", partial(_alike, mode, known))


def _teacher(scale: Scale, data: list[str], seconds: float, known: dict[str, Any]) -> dict[str, Any]:
    config = _config(scale.home / "edm", "edm", data, "precision=auto", *_AVERAGE)
    steps = _train(config, seconds)
    known["teacher"] = config.folder
    denoiser = load_denoiser(config.folder, device=scale.device)
    known["images"] = generate(denoiser, range(_NUM), sampler="heun", steps=18 if scale.gpu else 8)
    _show(scale, known, known["images"])
    return {"steps": steps, "spread": known["images"].float().std().item() / 127.5}


def _student(
    scale: Scale, data: list[str], mode: str, precision: str, seconds: float, known: dict[str, Any]
) -> dict[str, Any]:
    if "images" not in known:
        raise Skipped("without its teacher")
    start = [f"teacher={known['teacher']}"] if mode == "cd" else []
    name = f"{mode}-{precision}"
    config = _config(scale.home / name, mode, [*data, *start], f"precision={precision}", *_AVERAGE)
    steps = _train(config, seconds)
    images = generate(load_denoiser(config.folder, device=scale.device), range(_NUM))
    _show(scale, known, images)
    measured = agreement(images, known["images"])
    known[name] = measured.rms
    unrelated = agreement(images, known["images"].roll(1, 0)).rms
    found = {"steps": steps, "rms": measured.rms, "unrelated_rms": unrelated, "std_ratio": measured.std_ratio}
    # On a CPU there is no time to learn anything.
    assert not scale.gpu or measured.rms < 0.8 * unrelated, f"no nearer to the teacher's images than to others: {found}"
    return found


def _alike(mode: str, known: dict[str, Any]) -> dict[str, Any]:
    if not {f"{mode}-auto", f"{mode}-fp32"} <= known.keys():
        raise Skipped("without both")
    apart = known[f"{mode}-auto"] - known[f"{mode}-fp32"]
    assert apart < _SEED_NOISE, f"auto agrees less with the teacher, by {apart:.3f}"
    return {"rms_apart": apart}


def _config(folder: Path, mode: str, options: list[str], *more: str) -> RunConfig:
    batch_size = 128 if torch.cuda.is_available() else 32
    own = [
        f"run_dir={folder}",
        f"batch_size={batch_size}",
        "tracking=none",
        "preview_every=0",
        "steps=1000000",
        "log_every=100",
    ]
    own += ["optimizer.warmup_steps=50", "save_every=60m", "optimizer.lr=1e-3", "backbone.dropout=0"]
    return composed(f"mode={mode}", *options, *own, *more)


def _train(config: RunConfig, seconds: float) -> int:
    """Train for `seconds`, and return the number of steps."""
    config.folder.mkdir(parents=True)
    began: list[float] = []

    def should_stop(reserve_s: float) -> bool:
        began.append(time.monotonic())
        return began[-1] - began[0] >= seconds

    worker.run(config, should_stop)
    newest = checkpoint.newest_manifest(config.folder)
    assert newest is not None, "no step was made"
    return newest.step


def _show(scale: Scale, known: dict[str, Any], images: torch.Tensor) -> None:
    """One more row of the picture: sixteen images of the same seeds as in the rows above."""
    known["pictures"].append(images[:16])
    save_png(grid(torch.cat(known["pictures"]), columns=16), scale.out / "gpu_check.png")
