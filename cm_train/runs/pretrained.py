"""Pretrained weights that a run learns or starts from: found, the same on every rank, and fit for its images."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ..core.errors import InputError
from ..core.terminal import say
from ..core.world import World
from ..data.datasets.base import Dataset, listed
from ..models.checkpoints import find
from ..models.checkpoints import load as loading
from ..models.checkpoints.manifest import Manifest
from ..models.checkpoints.needed import mark_needed
from ..models.checkpoints.vanishing import Vanished, again, present
from ..models.denoiser import Denoiser
from ..training.config import RunConfig

T = TypeVar("T")


def load_teacher(path: str, known: str | None, student: Path, world: World) -> tuple[Denoiser, Manifest]:
    """The teacher, the same on every rank, and its manifest; `known` is the hash of the one that the run began with.

    Its own run may go on meanwhile: it is told to keep that checkpoint, and where it was quicker there is a newer one.
    """

    def seek() -> tuple[Path, Manifest]:
        folder, manifest = find.resolve(path) if known is None else find.resolve_known(path, known)
        mark_needed(folder, student)
        return folder, manifest

    return find_and_open(
        seek, lambda folder, manifest: loading.load_resolved(folder, manifest, device=world.device), world
    )


@again
def find_and_open(
    seek: Callable[[], tuple[Path, Manifest]], load: Callable[[Path, Manifest], T], world: World
) -> tuple[T, Manifest]:
    """What `load` makes, on every rank, of the checkpoint that rank 0 finds and verifies; again where it vanishes."""
    folder, manifest = world.run_on_main(seek)

    def load_here() -> T | None:
        with suppress(Vanished), present(folder):
            return load(folder, manifest)
        return None

    loaded = world.run_on_all(load_here)
    if any(world.any_rank(loaded is None)) or loaded is None:
        raise Vanished(folder)
    return loaded, manifest


def check_teacher(teacher: Denoiser, path: str, dataset: Dataset) -> None:
    """Raises InputError for a teacher of other images or classes, and for one that is no diffusion model."""
    c = teacher.config
    got, wanted = (c.image_size, c.image_channels), (dataset.image_size, dataset.channels)
    if got != wanted:
        raise InputError(f"teacher {path} makes other images", f"size, channels {got}", f"{wanted}", "set teacher=...")
    if c.num_classes != dataset.num_classes:
        raise InputError(
            f"teacher {path} has other classes", c.num_classes, str(dataset.num_classes), "set dataset.conditional=..."
        )
    if c.class_names and c.class_names != dataset.class_names:
        its, ours = listed(c.class_names), listed(dataset.class_names)
        raise InputError(f"teacher {path} has other classes", its, ours, "set teacher=..., or dataset.class_level=...")
    if c.kind != "diffusion":
        raise InputError(f"teacher {path} is not a diffusion model", f"a {c.kind} model", "a run of mode=edm")


def check_data_of_teacher(config: RunConfig, its_data: str | None, dataset: Dataset) -> None:
    """Refuse other data than the student's where nobody has chosen the teacher, and else say so."""
    if its_data is None or dataset.is_known_as(its_data):
        return
    if dataset.shares_images_with(its_data):
        say_what_was_seen(f"teacher {config.teacher}", its_data, dataset)
        return
    if config.teacher == str(config.usual_teacher):
        fix = "set teacher=..., or run_dir=... in a folder of its own"
        raise InputError(f"the teacher in {config.teacher} was trained on other data", fix=fix)
    say(f"note: teacher {config.teacher} was trained on other data than this run's")


def say_what_was_seen(who: str, its_data: str | None, dataset: Dataset) -> None:
    """Say so where weights that a run starts or learns from may know pictures that it holds out."""
    if its_data is None or dataset.is_known_as(its_data) or not dataset.shares_images_with(its_data):
        return
    what = f"note: {who} was trained on these pictures with others of them held out, or none"
    say(what + (": it may have seen what this run holds out" if dataset.num_held_out else ""))
