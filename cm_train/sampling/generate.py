"""Seeds to images: the one path that previews, cm-sample and the measures share."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..core.precision import arithmetic, autocast_type
from ..core.rng import PerImageNoise
from ..data.pixels import to_uint8
from ..models.denoiser import Denoiser
from .choosing import choose_levels, find_sampler
from .guidance import Guided, guided
from .labels import one_an_image
from .samplers.base import Sampler


def generate(
    denoiser: Denoiser | Guided,
    seeds: Iterable[int],
    *,
    sampler: str = "auto",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    labels: Sequence[int] | int | None = None,
    guidance: float | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    whole_batches: bool = False,
) -> Tensor:
    """One image a seed; uint8 [N, C, H, W] on the CPU.

    Image i depends on seeds[i] alone, whatever the batch size, and starts from the same noise with every
    checkpoint, sampler and number of steps.

    Args:
        sampler: see `find_sampler`.
        steps, sigmas: see `choose_levels`.
        labels: class of each image, or one for all; None draws them from the seeds where the network wants any.
        guidance: of a diffusion model that was trained with label dropout; 1 is none, more is closer to the class. None
            takes the model as it is.
        batch_size: images at once, 1 or more.
        precision: fp32, tf32, bf16 or fp16; what the network computes in.
        whole_batches: fill the last batch up, as compiled networks need it, and throw away what is too much.

    Raises:
        InputError: labels that the network doesn't have, an impossible choice of levels, no model to guide, or one that
            is guided already.
    """
    denoiser = guided(denoiser, guidance)
    seeds, config = list(seeds), denoiser.config
    _, chosen = find_sampler(sampler, config.kind)
    levels = choose_levels(chosen, config, steps, sigmas)
    classes = None if labels is None else one_an_image(labels, len(seeds), config.num_classes)
    batches = generate_batches(
        denoiser,
        chosen,
        levels,
        seeds,
        classes,
        batch_size=batch_size,
        precision=precision,
        whole_batches=whole_batches,
    )
    return torch.cat([torch.empty(0, *config.image_shape, dtype=torch.uint8), *batches])


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
) -> Iterator[Tensor]:
    """The images of `generate` as they come, `batch_size` at a time, in the order of the seeds.

    Args:
        levels: as `choose_levels` gives them.
        labels: a class that the network has for each seed, or None.

    Yields:
        uint8 [B, C, H, W] on the CPU.
    """
    for start in range(0, len(seeds), batch_size):
        rows = [*range(start, min(start + batch_size, len(seeds)))]
        num = len(rows)
        if whole_batches:
            rows += [rows[-1]] * (batch_size - num)
        some = None if labels is None else [labels[row] for row in rows]
        yield _draw(denoiser, sampler, levels, [seeds[row] for row in rows], some, precision)[:num]


@torch.no_grad()
def _draw(
    denoiser: Denoiser | Guided,
    sampler: Sampler,
    levels: Sequence[float],
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    precision: str,
) -> Tensor:
    """One batch; see `generate_batches`."""
    config, device = denoiser.config, next(denoiser.parameters()).device
    noise = PerImageNoise(seeds, device)
    if labels is not None:
        classes: Tensor | None = torch.tensor(labels, device=device)
    else:
        classes = noise.randint("label", config.num_classes) if config.num_classes else None

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma, classes)

    def renoise(i: int) -> Tensor:
        return noise.randn(f"renoise-{i}", config.image_shape)

    x = noise.randn("initial", config.image_shape) * levels[0]
    autocast = autocast_type(precision, device)
    with arithmetic(precision), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        x = sampler.sample(denoise, x, levels, config.sigma_boundary, renoise)
    return to_uint8(x).cpu()
