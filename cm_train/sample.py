"""cm-sample: images from a checkpoint."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import Field

from . import cli, registry
from .errors import InputError
from .registry import Settings

if TYPE_CHECKING:
    from torch import Tensor


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
    batch_size: Annotated[int, Field(ge=1)]
    out: str | None
    format: Literal["png", "npz"]
    device: str


def sample(cfg: DictConfig) -> int:
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue:
        raise InputError("no checkpoint given", fix="cm-sample ckpt=runs/<name>") from None
    assert isinstance(values, dict)
    config = registry.typed(SampleConfig, {str(k): v for k, v in values.items()})

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from .checkpoint import load_denoiser, resolve
    from .generation import choose_levels, generate
    from .images import grid, save_png

    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    folder, _ = resolve(config.ckpt)
    try:
        denoiser = load_denoiser(folder, config.weights, device)
    except RuntimeError as error:
        raise InputError(f"can't use device {device}", str(error).splitlines()[0], "auto, cpu, cuda") from None
    sampler, levels = choose_levels(denoiser, config.sampler, config.steps, config.sigmas)
    run = folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
    out = Path(config.out or f"samples/{run}")
    _make(out)

    console = Console(stderr=True)
    calls = 2 * len(levels) - 1 if sampler == "heun" else len(levels)
    console.print(
        f"{config.num} images from {folder} ({config.weights} weights), {sampler}, {calls} network calls each",
        highlight=False,
    )
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("sampling", total=config.num)
        images = generate(
            denoiser,
            range(config.seed, config.seed + config.num),
            sampler=config.sampler,
            steps=config.steps,
            sigmas=config.sigmas,
            labels=config.labels,
            batch_size=config.batch_size,
            progress=lambda done: bar.update(task, completed=done),
        )
        try:
            if config.format == "npz":
                _save_npz(images, out / "samples.npz")
            else:
                task = bar.add_task("writing", total=config.num)
                for i, image in enumerate(images):
                    save_png(image, out / f"{config.seed + i:06d}.png")
                    bar.update(task, completed=i + 1)
            save_png(grid(images[:100]), out / "grid.png")
        except OSError as error:
            raise InputError(f"can't write to {out}: {error.strerror}", fix="set out=...") from None
    console.print(f"wrote {out}{os.sep} and {out / 'grid.png'}", highlight=False)
    return cli.DONE


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {folder}: {error.strerror}", fix="set out=...") from None


def _save_npz(images: "Tensor", path: Path) -> None:
    import numpy as np

    np.savez(path, images.permute(0, 2, 3, 1).contiguous().numpy())  # arr_0, uint8 NHWC


def main() -> None:
    cli.run("sample", sample)


if __name__ == "__main__":
    main()
