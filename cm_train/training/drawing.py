"""Images drawn by all ranks of a run together, in the middle of training, which must not end where memory does."""

from torch import Tensor

from ..core.memory import needed_memory
from ..core.terminal import complain
from ..core.world import World
from ..models.denoiser import Denoiser
from ..sampling.generate import generate
from ..sampling.guidance import Guided


def draw_together(
    denoiser: Denoiser | Guided, num: int, batch_size: int, world: World, what: str, fix: str
) -> Tensor | None:
    """The images of the seeds 0 to num - 1, on rank 0; this rank's own elsewhere.

    Args:
        batch_size: images at once on a rank.
        what, fix: what there will be none of, and what would need less memory.

    Returns:
        None on every rank where the memory of one ran out, which is said.
    """
    rank, size = world.rank, world.size
    mine = range(num * rank // size, num * (rank + 1) // size)
    images, shortage = None, ""
    try:
        images = generate(denoiser, mine, batch_size=batch_size)
    except Exception as error:
        needed = needed_memory(error)
        if needed is None:
            raise
        shortage = needed
    if any(world.any_rank(bool(shortage))):
        shortage = world.first_message(shortage)
        if world.is_main:
            complain(f"no {what}, for want of memory: {shortage}; fix: {fix}")
        return None
    assert images is not None
    return world.gather(images)
