"""Sample pictures during training: always the same seeds, made by the code that makes the real ones."""

import time
from pathlib import Path

from torch import Tensor

from ..core.errors import InputError
from ..core.run_layout import DATA_PICTURE, step_name
from ..core.terminal import complain
from ..core.world import World
from ..data.loader import Loader
from ..data.pixels import grid, save_png
from ..evaluation.metrics.agreement import agreement
from ..models.denoiser import Denoiser
from ..sampling.by_hand import captions
from ..sampling.guidance import Guided
from ..sampling.labels import captions_of
from .drawing import draw_together

NUM_PREVIEWS = 64


def show_data(loader: Loader, folder: Path, anew: bool) -> None:
    """Write the images with which training begins, decoded and cropped; not yet flipped, where the set is.

    What a look at it shows: a wrong crop, a colour that is gone, pictures that should not be among them.

    Args:
        anew: whether a picture that is there already is replaced.
    """
    path = folder / DATA_PICTURE
    if path.exists() and not anew:
        return
    try:
        images, labels = loader.dataset.gather(loader.first(NUM_PREVIEWS))
    except (InputError, OSError):
        return  # training comes to that image too, and says which it is
    classes = None if labels is None else captions_of(labels.tolist(), loader.dataset.class_names)
    try:
        save_png(grid(images.cpu(), captions=classes), path)
    except OSError as error:
        complain(f"could not write {path}: {error.strerror or error}")


class Previews:
    """A grid of samples a preview, and how well they agree with the teacher's from the same seeds.

    Args:
        folder: where the pictures go.
        batch_size: images at once on a rank, no more than training has shown to fit.
        world: every rank makes its share.
    """

    def __init__(self, folder: Path, batch_size: int, world: World, teacher: Denoiser | Guided | None = None):
        self.folder, self.world, self.teacher = folder, world, teacher
        self.batch_size = min(batch_size, NUM_PREVIEWS)
        self._teachers: Tensor | None = None
        self.num_made = 0
        self.took_s = self._once_s = 0.0  # what the last one took, as the next one may; and the teacher's beside

    def make(self, denoiser: Denoiser, step: int) -> tuple[Path | None, dict[str, float]]:
        """Draw and, on rank 0, write and measure; every rank calls this at the same step.

        Returns:
            The picture, None on other ranks or where it could not be written; named measures.
        """
        began = time.monotonic()
        self.num_made += 1
        try:
            return self._make(denoiser, step)
        finally:
            self.took_s = time.monotonic() - began - self._once_s

    def _make(self, denoiser: Denoiser, step: int) -> tuple[Path | None, dict[str, float]]:
        images, self._once_s = self._generate(denoiser), 0.0
        if images is not None and self.teacher is not None and self._teachers is None:
            began = time.monotonic()
            self._teachers = self._generate(self.teacher)
            self._once_s = time.monotonic() - began
        if images is None or not self.world.is_main:
            return None, {}
        values = {}
        if self._teachers is not None:
            # The loss falls during a collapse too; agreement with the teacher does not.
            measured = agreement(images, self._teachers)
            values = {"agreement_rms": measured.rms, "agreement_std_ratio": measured.std_ratio}
        path = self.folder / f"{step_name(step)}.png"
        try:
            save_png(grid(images, captions=captions(denoiser, NUM_PREVIEWS)), path)
        except OSError as error:
            complain(f"could not write the preview of step {step}: {error.strerror}")
            return None, values
        return path, values

    def _generate(self, denoiser: Denoiser | Guided) -> Tensor | None:
        fix = "micro_batch=..., or preview_every=0"
        return draw_together(denoiser, NUM_PREVIEWS, self.batch_size, self.world, "preview", fix)
