"""Seeds to images: the one path that previews, cm-sample and the measures share."""

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.precision import arithmetic, autocast_type
from ..core.registry import shown
from ..core.rng import PerImageNoise
from ..data.pixels import to_uint8
from ..models.denoiser import Denoiser, DenoiserConfig
from ..models.noise_levels import karras_sigmas
from . import samplers as sampling
from .guidance import Guided, guided

SAMPLERS = ("auto", "onestep", "multistep", "euler", "heun")


def choose_levels(
    denoiser: Denoiser | Guided, sampler: str = "auto", steps: int | None = None, sigmas: Sequence[float] | None = None
) -> tuple[str, list[float]]:
    """The sampler and the noise levels that a request means.

    Args:
        sampler: "auto" takes Heun for a diffusion checkpoint and multistep for a consistency model.
        steps: number of levels; None: 1 for a consistency model, the checkpoint's grid for an ODE sampler.
        sigmas: the levels themselves, descending; wins over what the checkpoint stores for `steps`.
    """
    config = denoiser.config
    if sampler not in SAMPLERS:
        raise InputError("unknown sampler", sampler, ", ".join(SAMPLERS))
    if steps is not None and steps < 1:
        raise InputError("steps must be positive", steps, "1, 2, 3, ...")
    if sampler == "auto":
        sampler = "heun" if config.kind == "diffusion" else "multistep"
    if sigmas is not None:
        levels = [float(s) for s in sigmas]
        ordered = all(a > b for a, b in itertools.pairwise(levels))
        if not levels or not ordered or levels[-1] < config.sigma_min or not levels[0] < float("inf"):
            raise InputError("sigmas must descend", str(levels), f"noise levels of at least {config.sigma_min}")
        if steps is not None and steps != len(levels):
            raise InputError("steps and sigmas disagree", f"steps={steps} and {len(levels)} sigmas", fix="drop steps=")
    elif sampler in ("euler", "heun"):
        steps = config.sampling.num_scales if steps is None else steps
        grid = karras_sigmas(max(steps, 2), config.sigma_min, config.sigma_max, config.rho)
        levels = grid.tolist()[:steps]
    else:
        steps = 1 if steps is None else steps
        stored = config.sampling.points.get(steps)
        levels = _spread(config, steps) if stored is None else stored
    if sampler == "onestep" and len(levels) != 1:
        raise InputError("sampler=onestep makes one step", f"steps={len(levels)}", fix="sampler=multistep")
    return "multistep" if sampler == "onestep" else sampler, levels


def _spread(config: DenoiserConfig, steps: int) -> list[float]:
    """Evenly spaced indices of the checkpoint's grid, from sigma_max down, without sigma_min."""
    num = config.sampling.num_scales
    if steps > num - 1:
        raise InputError("more steps than the checkpoint's grid has", steps, f"1 to {num - 1}", "give sigmas=[...]")
    grid = karras_sigmas(num, config.sigma_min, config.sigma_max, config.rho).tolist()
    return [grid[round(i * (num - 1) / steps)] for i in range(steps)]


@torch.no_grad()
def generate(
    denoiser: Denoiser | Guided,
    seeds: Iterable[int],
    *,
    sampler: str = "auto",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    labels: Sequence[int] | int | None = None,
    guidance: float = 1.0,
    batch_size: int = 256,
    precision: str = "fp32",
    whole_batches: bool = False,
) -> Tensor:
    """One image a seed; uint8 [N, C, H, W] on the CPU.

    Image i depends on seeds[i] alone, whatever the batch size, and starts from the same noise with every
    checkpoint, sampler and number of steps.

    Args:
        sampler, steps, sigmas: see `choose_levels`.
        labels: class of each image, or one for all; None draws them from the seeds where the network wants any.
        guidance: of a diffusion model that was trained with label dropout; 1 is none, more is closer to the class.
        precision: fp32, tf32, bf16 or fp16; what the network computes in.
        whole_batches: fill the last batch up, as compiled networks need it, and throw away what is too much.

    Raises:
        InputError: labels that the network doesn't have, an impossible choice of levels, or no model to guide.
    """
    if guidance != 1 and isinstance(denoiser, Denoiser):
        denoiser = guided(denoiser, guidance)
    seeds, config = list(seeds), denoiser.config
    sampler, levels = choose_levels(denoiser, sampler, steps, sigmas)
    classes = _check_labels(labels, len(seeds), config.num_classes)
    device = next(denoiser.parameters()).device
    shape = (config.image_channels, config.image_size, config.image_size)
    done = [torch.empty(0, *shape, dtype=torch.uint8)]
    autocast = autocast_type(precision, device)
    for start in range(0, len(seeds), batch_size):
        rows = [*range(start, min(start + batch_size, len(seeds)))]
        surplus = batch_size - len(rows) if whole_batches else 0
        rows += [rows[-1]] * surplus
        noise = PerImageNoise([seeds[row] for row in rows], device)
        if classes is not None:
            chosen: Tensor | None = torch.tensor([classes[row] for row in rows], device=device)
        else:
            chosen = noise.randint("label", config.num_classes) if config.num_classes else None
        x = noise.randn("initial", shape) * levels[0]

        def denoise(x: Tensor, sigma: Tensor, chosen: Tensor | None = chosen) -> Tensor:
            return denoiser(x, sigma, chosen)

        def renoise(i: int, noise: PerImageNoise = noise) -> Tensor:
            return noise.randn(f"renoise-{i}", shape)

        with arithmetic(precision), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            if sampler == "multistep":
                x = sampling.multistep(denoise, x, levels, config.sigma_boundary, renoise)
            else:
                x = (sampling.heun if sampler == "heun" else sampling.euler)(denoise, x, levels)
        done.append(to_uint8(x[: len(rows) - surplus]).cpu())
    return torch.cat(done)


def class_numbers(asked: int | str | Sequence[int | str], count: int, config: DenoiserConfig) -> int | list[int]:
    """The classes that a user wants `count` images of, each by its name or number, as `generate(labels=)` takes them.

    A name wins: folders called 1, 2, ..., 10 are classes in another order.

    Raises:
        InputError: the checkpoint has no such class, or it is not one label an image.
    """
    known = {name: number for number, name in enumerate(config.class_names)}
    if isinstance(asked, int | str):
        numbers: int | list[int] = _class_number(asked, known, config.num_classes)
    else:
        numbers = [_class_number(label, known, config.num_classes) for label in asked]
    _check_labels(numbers, count, config.num_classes)
    return numbers


def _class_number(label: int | str, known: Mapping[str, int], num_classes: int) -> int:
    if str(label) in known:
        return known[str(label)]
    if isinstance(label, int):
        return label
    if not num_classes:
        raise InputError("this checkpoint has no classes", f"labels={shown(label)}", fix="drop labels=")
    if not known:
        raise InputError("this checkpoint knows its classes by number alone", shown(label), f"0 to {num_classes - 1}")
    names = shown(", ".join(itertools.islice(known, 100)))
    near = difflib.get_close_matches(label, known, 1, cutoff=0.5)
    fix = f"labels={near[0]}" if near else None
    raise InputError("no such class", shown(label), f"{names}, or 0 to {num_classes - 1}", fix)


def _check_labels(labels: Sequence[int] | int | None, count: int, num_classes: int) -> list[int] | None:
    if labels is None:
        return None
    classes = [labels] * count if isinstance(labels, int) else list(labels)
    if not num_classes:
        raise InputError("this checkpoint has no classes", f"labels={shown(labels)}", fix="drop labels=")
    if len(classes) != count:
        raise InputError("one label an image is needed", f"{len(classes)} labels for {count} images")
    if not all(0 <= c < num_classes for c in classes):
        raise InputError("no such class", shown(labels), f"0 to {num_classes - 1}")
    return classes
