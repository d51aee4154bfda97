"""cm-sample: images from a checkpoint."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import Field

from . import cli, registry
from .errors import InputError
from .files import not_through_a_link
from .registry import Settings

if TYPE_CHECKING:
    from torch import Tensor

GRID_IMAGES = 100


class SampleConfig(Settings):
    """The keys of cm-sample."""

    ckpt: str
    num: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)] | None
    sigmas: list[float] | None
    sampler: Literal["auto", "onestep", "multistep", "euler", "heun"]
    weights: str
    labels: int | list[int] | None
    guidance: Annotated[float, Field(ge=0)]
    batch_size: Annotated[int, Field(ge=1)]
    out: str | None
    format: Literal["png", "npz"]
    device: str
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    compile: bool = False


def sample(cfg: DictConfig) -> int:
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue:
        raise InputError("no checkpoint given", fix="cm-sample ckpt=runs/<name>") from None
    assert isinstance(values, dict)
    config = registry.typed(SampleConfig, {str(k): v for k, v in values.items()})
    if isinstance(config.labels, list) and len(config.labels) != config.num:
        raise InputError(
            "one label an image is needed", f"{len(config.labels)} labels", f"num={config.num} of them, or one"
        )

    import torch

    from .checkpoint import resolve
    from .compile_policy import compile_alike
    from .compiling import CompiledBlocks
    from .distributed import ALONE
    from .generation import choose_levels, generate
    from .images import grid, save_png
    from .loading import load_resolved
    from .memory import shortage_explained
    from .precision import arithmetic
    from .tracking import progress, say

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device != "auto":
        device = config.device
        gpus = torch.cuda.device_count()
        known = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
        if device not in known:
            raise InputError("no such device here", device, ", ".join(["auto", *known]))
    folder, manifest = resolve(config.ckpt)
    with shortage_explained("while the checkpoint was being loaded", "device=cpu, or less beside it on this machine"):
        denoiser = load_resolved(folder, manifest, config.weights, device)
    sampler, levels = choose_levels(denoiser, config.sampler, config.steps, config.sigmas)
    run = folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
    out = Path(os.path.expanduser(f"samples/{run}" if config.out is None else config.out))
    _make(out)

    calls = 2 * len(levels) - 1 if sampler == "heun" else len(levels)
    say(f"{config.num} images from {folder}, {config.weights} weights, {calls} network call{'s' * (calls > 1)} each")
    seeds = range(config.seed, config.seed + config.num)
    kept = []  # all of them for npz, enough for the grid otherwise
    batch_size = min(config.batch_size, config.num)
    fix = f"batch_size={max(1, batch_size // 2)} (now {batch_size})"

    def draw(part: slice, **levels: Any) -> "Tensor":
        return generate(
            denoiser,
            seeds[part],
            labels=config.labels[part] if isinstance(config.labels, list) else config.labels,
            guidance=config.guidance,
            batch_size=batch_size,
            precision=config.precision,
            whole_batches=config.compile,
            **levels,
        )

    try:
        with shortage_explained(f"drawing {batch_size} images at once", fix), progress(config.num, "sampling") as bar:
            if config.compile:
                one_call = {"sampler": "multistep", "sigmas": levels[:1]}
                blocks = CompiledBlocks(denoiser)
                with arithmetic(config.precision):
                    compile_alike(blocks, lambda: draw(slice(batch_size), **one_call), "true", ALONE, lambda: False)
            for start in range(0, config.num, batch_size):
                part = slice(start, start + batch_size)
                images = draw(part, sampler=config.sampler, steps=config.steps, sigmas=config.sigmas)
                if config.format == "png":
                    for seed, image in zip(seeds[part], images, strict=True):
                        save_png(image, out / f"{seed:06d}.png")
                if config.format == "npz" or start < GRID_IMAGES:
                    kept.append(images)
                bar.update(min(start + batch_size, config.num))
        all_kept = torch.cat(kept)
        if config.format == "npz":
            _save_npz(all_kept, out / "samples.npz")
        save_png(grid(all_kept[:GRID_IMAGES]), out / "grid.png")
    except OSError as error:
        raise InputError(f"can't write to {out}: {error.strerror}", fix="free space, or set out=...") from None
    others = sum(p.stem.isdecimal() and int(p.stem) not in seeds for p in out.glob("*.png"))
    if config.format == "png" and others:
        say(f"note: {out} also holds {others} images of other seeds")
    say(f"wrote {out / 'grid.png'} and the images beside it")
    return cli.DONE


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {folder}: {error.strerror}", fix="set out=...") from None


def _save_npz(images: "Tensor", path: Path) -> None:
    import numpy as np

    with open(path, "wb", opener=not_through_a_link) as file:
        np.savez(file, images.permute(0, 2, 3, 1).contiguous().numpy())  # arr_0, uint8 NHWC


def main() -> None:
    cli.begin("sample")
    cli.run("sample", sample)


if __name__ == "__main__":
    main()
