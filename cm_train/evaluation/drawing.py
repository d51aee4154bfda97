"""Images of a model for measuring: drawn block by block and looked at as they come, none kept but a few to show."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.memory import shortage_explained
from ..core.progress import Progress
from ..models.denoiser import Denoiser
from ..sampling.choosing import choose_levels, find_sampler
from ..sampling.generate import generate_batches
from ..sampling.guidance import Guided
from ..sampling.samplers.base import Sampler
from .features.base import Extractor
from .seen import Seen, look


@dataclass(frozen=True)
class Drawing:
    """How a model's images are drawn.

    Attributes:
        name: of the sampler.
        levels: noise levels, descending.
        labels: classes that take turns, from the image of `first_seed` on; None leaves them to the seeds.
    """

    denoiser: Denoiser | Guided
    name: str
    sampler: Sampler
    levels: list[float]
    labels: Sequence[int] | None = None
    precision: str = "fp32"
    batch_size: int = 256
    first_seed: int = 0

    @classmethod
    def of(
        cls,
        denoiser: Denoiser | Guided,
        sampler: str = "auto",
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        labels: Sequence[int] | None = None,
        precision: str = "fp32",
        batch_size: int = 256,
        first_seed: int = 0,
    ) -> "Drawing":
        """See `find_sampler` and `choose_levels`. Raises InputError, as they do."""
        name, chosen = find_sampler(sampler, denoiser.config.kind)
        levels = choose_levels(chosen, denoiser.config, steps, sigmas)
        return cls(denoiser, name, chosen, levels, labels, precision, batch_size, first_seed)

    @property
    def network_calls(self) -> int:
        """For an image."""
        return self.sampler.num_calls(len(self.levels))

    def batches(self, seeds: Sequence[int]) -> Iterator[Tensor]:
        """uint8 images [B, C, H, W] on the CPU, in the order of the seeds."""
        turns = self.labels
        labels = None if turns is None else [turns[(seed - self.first_seed) % len(turns)] for seed in seeds]
        return generate_batches(
            self.denoiser,
            self.sampler,
            self.levels,
            seeds,
            labels,
            batch_size=self.batch_size,
            precision=self.precision,
            whole_batches=False,
        )

    def look(self, extractor: Extractor, seeds: Sequence[int], keep: int, bar: Progress) -> tuple[Seen, Tensor]:
        """What `extractor` sees in the images of `seeds`, and the first `keep` of them.

        Raises:
            OutOfMemory: fewer at once would fit.
            Stopped: see `signals.heed`.
        """
        kept: list[Tensor] = []
        fix = f"batch_size={max(1, self.batch_size // 2)} (now {self.batch_size})"
        with shortage_explained(f"drawing {self.batch_size} images at once", fix):
            seen = look(extractor, _noting(self.batches(seeds), keep, kept.append), bar)
        return seen, torch.cat([torch.empty(0, *self.denoiser.config.image_shape, dtype=torch.uint8), *kept])


def _noting(batches: Iterator[Tensor], keep: int, note: Callable[[Tensor], object]) -> Iterator[Tensor]:
    """The batches as they come; `note` hears of the first `keep` images."""
    for batch in batches:
        if keep > 0:
            note(batch[:keep])
            keep -= len(batch)
        yield batch
