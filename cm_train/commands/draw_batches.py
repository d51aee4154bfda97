"""Drawing the images of a request, batch by batch, in whatever process does it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from ..core.memory import shortage_explained
from ..core.precision import arithmetic
from ..core.signals import heed
from ..core.world import ALONE, World
from ..models.compiling import CompiledBlocks
from ..models.denoiser import Denoiser
from ..sampling.generate import generate_batches
from ..sampling.guidance import Guided
from ..sampling.labels import one_an_image
from ..sampling.samplers.base import Sampler
from ..training.compile_policy import compile_alike
from .sample_files import ImageFiles
from .sample_folder import Request, writing


@dataclass(frozen=True)
class Job:
    """A request, what draws it, and where its images go."""

    request: Request
    checkpoint: Path  # the folder that `denoiser` is from
    denoiser: Denoiser | Guided
    sampler: Sampler
    out: Path


def draw(
    job: Job,
    files: ImageFiles,
    places: list[int],
    batch_size: int,
    compiled: bool,
    advance: Callable[[int], object],
    world: World = ALONE,
) -> None:
    """Draw the images of `places`, and write each batch as it comes; a signal is heeded at each network call.

    Args:
        advance: told how many more are written.
        world: says which process of several this is; each draws places of its own and needs no other.

    Raises:
        InputError: they can't be written, or this machine can't compile.
        OutOfMemory: fewer at once would fit.
        Stopped: by a signal; what was drawn is written.
    """
    request = job.request
    asked, num_classes = request.classes(request.num), job.denoiser.config.num_classes
    classes = None if asked is None else one_an_image(asked, request.num, num_classes)

    def batches(places: list[int], levels: list[float]) -> Iterator[Tensor]:
        return generate_batches(
            job.denoiser,
            job.sampler,
            levels,
            [request.seed + place for place in places],
            None if classes is None else [classes[place] for place in places],
            batch_size=batch_size,
            precision=request.precision,
            whole_batches=compiled,
        )

    def try_out() -> Tensor:  # at one level: that is one network call, and all are alike
        return next(batches(places[:batch_size], request.sigmas[:1]))

    fix = f"batch_size={max(1, batch_size // 2)} (now {batch_size})"
    job.denoiser.register_forward_pre_hook(lambda *_: heed())
    with shortage_explained(f"drawing {batch_size} images at once", fix):
        if compiled:
            blocks = CompiledBlocks(job.denoiser)
            with arithmetic(request.precision):
                compile_alike(blocks, try_out, "true", world, lambda: False)
        left = iter(places)
        for images in batches(places, request.sigmas):
            with writing(job.out):
                files.add([*islice(left, len(images))], images)
            advance(len(images))
