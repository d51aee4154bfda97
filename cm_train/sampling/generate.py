"""Seeds to images: the one path that previews, cm-sample and the measures share."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.precision import arithmetic, autocast_type
from ..core.rng import PerImageNoise
from ..data.pixels import to_uint8
from ..models.denoiser import Denoiser
from .by_hand import Labels, Model, Seeds, as_denoiser, as_labels, as_seeds, check_noise
from .choosing import choose_levels, find_sampler
from .guidance import Guided, guided
from .labels import drawn_labels
from .samplers.base import Sampler


def generate(
    denoiser: Model,
    seeds: Seeds,
    *,
    sampler: str = "auto",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    labels: Labels | None = None,
    guidance: float | None = None,
    noise: Tensor | None = None,
    as_float: bool = False,
    batch_size: int = 256,
    precision: str = "fp32",
    whole_batches: bool = False,
) -> Tensor:
    """One image a seed; uint8 [N, C, H, W] on the CPU.

    Image i depends on seeds[i] alone, whatever the batch size, and starts from the same noise with every
    checkpoint, sampler and number of steps.

    Args:
        denoiser: what `load_denoiser` returns, or the path of a run or checkpoint, whose averaged weights are then
            loaded for this call, to a GPU where there is one.
        seeds: the seed of each image, or how many images: 0, 1, 2, ...
        sampler: see `find_sampler`.
        steps, sigmas: see `choose_levels`.
        labels: class of each image, or one for all, by name or number; None draws them from the seeds where the network
            wants any.
        guidance: of a diffusion model that was trained with label dropout; 1 is none, more is closer to the class. None
            takes the model as it is.
        noise: what the images begin as in place of their seeds' noise, unit normals [N, C, H, W]; see `initial_noise`.
            Labels, and what a sampler adds later, are the seeds' own as ever.
        as_float: float32 images, nominally in [-1, 1], as the network made them: neither clamped nor rounded.
        batch_size: images at once, 1 or more.
        precision: fp32, tf32, bf16 or fp16; what the network computes in.
        whole_batches: fill the last batch up, as compiled networks need it, and throw away what is too much.

    Raises:
        InputError: no such checkpoint, labels that the network doesn't have, an impossible choice of levels, noise of
            another shape, no model to guide, or one that is guided already.
    """
    model, numbers = guided(as_denoiser(denoiser), guidance), as_seeds(seeds)
    config = model.config
    _, chosen = find_sampler(sampler, config.kind)
    levels = choose_levels(chosen, config, steps, sigmas)
    classes = None if labels is None else as_labels(labels, len(numbers), config)
    if noise is not None:
        check_noise(noise, len(numbers), config)
    batches = generate_batches(
        model,
        chosen,
        levels,
        numbers,
        classes,
        batch_size=batch_size,
        precision=precision,
        whole_batches=whole_batches,
        noise=noise,
        as_float=as_float,
    )
    return torch.cat([torch.empty(0, *config.image_shape, dtype=torch.float32 if as_float else torch.uint8), *batches])


def generate_batches(
    denoiser: Denoiser | Guided,
    sampler: Sampler,
    levels: Sequence[float],
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    *,
    batch_size: int,
    precision: str,
    whole_batches: bool,
    noise: Tensor | None = None,
    as_float: bool = False,
) -> Iterator[Tensor]:
    """The images of `generate` as they come, `batch_size` at a time, in the order of the seeds.

    Args:
        levels: as `choose_levels` gives them.
        labels: a class that the network has for each seed, or None.

    Yields:
        uint8 [B, C, H, W] on the CPU, or float32 where that is asked for.
    """
    for start in range(0, len(seeds), batch_size):
        rows = [*range(start, min(start + batch_size, len(seeds)))]
        num = len(rows)
        if whole_batches:
            rows += [rows[-1]] * (batch_size - num)
        some = None if labels is None else [labels[row] for row in rows]
        begun = None if noise is None else noise[rows]
        x = _draw(denoiser, sampler, levels, [seeds[row] for row in rows], some, begun, precision)[:num]
        yield (x.float() if as_float else to_uint8(x)).cpu()


@torch.no_grad()
def _draw(
    denoiser: Denoiser | Guided,
    sampler: Sampler,
    levels: Sequence[float],
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    begun: Tensor | None,
    precision: str,
) -> Tensor:
    """One batch, where the network is; not clamped. See `generate_batches`."""
    config, device = denoiser.config, next(denoiser.parameters()).device
    noise = PerImageNoise(seeds, device)
    if labels is None and config.num_classes:
        labels = drawn_labels(seeds, config.num_classes)
    classes = None if labels is None else torch.tensor(labels, device=device)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma, classes)

    def renoise(i: int) -> Tensor:
        return noise.randn(f"renoise-{i}", config.image_shape)

    unit = noise.randn("initial", config.image_shape) if begun is None else begun.to(device, torch.float32)
    x = unit * levels[0]
    autocast = autocast_type(precision, device)
    with arithmetic(precision), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        x = sampler.sample(denoise, x, levels, config.sigma_boundary, renoise)
    return x
