"""Drawing the images of a request, batch by batch, in whatever process does it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.memory import shortage_explained
from ..core.precision import arithmetic
from ..core.signals import heed
from ..core.world import ALONE, World
from ..models.compiling import CompiledBlocks
from ..models.denoiser import Denoiser
from ..sampling.by_hand import initial_noise
from ..sampling.generate import generate_batches
from ..sampling.guidance import Guided
from ..sampling.labels import one_an_image
from ..sampling.samplers.base import Sampler
from ..training.compile_policy import compile_alike
from .behind import Behind, ahead
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
    batches: list[range],
    compiled: bool,
    advance: Callable[[int], object],
    world: World = ALONE,
) -> None:
    """Draw these batches, and write each while the next is drawn; a signal is heeded at each network call.

    Args:
        batches: the places of each.
        advance: told how many more are written.
        world: says which process of several this is; each draws batches of its own and needs no other.

    Raises:
        InputError: they can't be written, or this machine can't compile.
        OutOfMemory: fewer at once would fit.
        Stopped: by a signal; what was drawn is written.
    """
    request, num_classes = job.request, job.denoiser.config.num_classes
    # What is compiled is for one shape; the last batch is filled up to it.
    most = min(request.batch_size or 1, request.num)

    def seeds(batch: range) -> range:
        return range(request.seed + batch.start, request.seed + batch.stop)

    def drawn(batch: range, levels: list[float], noise: Tensor | None = None) -> Tensor:
        classes = request.classes_at(batch)
        return next(
            generate_batches(
                job.denoiser,
                job.sampler,
                levels,
                seeds(batch),
                None if classes is None else one_an_image(classes, len(batch), num_classes),
                batch_size=most,
                precision=request.precision,
                whole_batches=compiled,
                noise=noise,
            )
        )

    def write(batch: range, images: Tensor) -> None:
        with writing(job.out):
            files.add(batch, images)
        advance(len(batch))

    job.denoiser.register_forward_pre_hook(lambda *_: heed())
    with shortage_explained(f"drawing {most} images at once", f"batch_size={max(1, most // 2)} (now {most})"):
        if compiled:
            blocks = CompiledBlocks(job.denoiser)
            with arithmetic(request.precision):  # at one level: that is one network call, and all are alike
                compile_alike(blocks, lambda: drawn(batches[0], request.sigmas[:1]), "true", world, lambda: False)
        with Behind(write) as behind:
            # Noise is drawn on the CPU, one image after the other: a GPU would wait for that of the next batch.
            for batch, noise in ahead(lambda batch: initial_noise(job.denoiser, seeds(batch)), batches):
                behind.put(batch, drawn(batch, request.sigmas, noise))
