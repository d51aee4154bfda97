"""What runs on a user's own pictures are called: after their folder, unless other pictures have that name already."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..core import registry
from ..core.errors import InputError
from ..core.terminal import say
from ..data.datasets.base import DatasetConfig
from ..data.datasets.image_folder import ImageFolder
from ..data.fingerprint import SCHEME
from ..models.checkpoints import read as checkpoint
from ..training.config import RunConfig
from .config import Composed
from .read_back import read_back

_MOST = 50  # run folders that are looked into


def named_for_its_pictures(composed: Composed) -> Composed:
    """The same, called otherwise where its name is that of runs on other pictures.

    Where the same pictures have a run of this kind under another name, that is said.
    """
    config = composed.config
    if not isinstance(config.dataset, ImageFolder.Config) or composed.experiment is not None:
        return composed
    home, name = config.folder.parent, config.data_name or config.dataset.run_name
    others = list(_runs(home))
    if not others:
        return composed
    pictures = _Pictures(config.dataset)
    # A sweep has named its jobs' runs already, and its records say how.
    is_asked = composed.is_sweep or bool({"data_name", "name", "run_dir"} & composed.asked)
    if not is_asked and any(_is_called(run, name) and not pictures.are_in(run, known) for run, known in others):
        own = f"{name}-{pictures.digest()}"
        root = config.dataset.root
        say(f"{home} has runs called {name} on other pictures, so those on {root} are called {own}")
        old = home / f"{name}-{config.mode}"
        say(f"note: a run can't go on with pictures that have changed; init={old} starts one from its weights")
        composed, name = composed.called(own), own
    folder = composed.config.folder
    for run, recorded in others:
        teaches = registry.component(run.objective).kind == "diffusion"
        is_teacher = teaches and config.needs_teacher() and config.teacher is None
        is_same_kind = run.mode == config.mode and not is_asked
        if folder.exists() or _is_called(run, name) or not (is_teacher or is_same_kind):
            continue
        if pictures.are_in(run, recorded):
            what = "a teacher" if is_teacher else "a run"
            how = f"teacher={run.folder} takes it" if is_teacher else f"name={run.folder.name} goes on with it"
            say(f"note: the same pictures have {what} of another name, {run.folder}: {how}")
    return composed


def _is_called(run: RunConfig, name: str) -> bool:
    return run.folder.name == f"{name}-{run.mode}"


def _runs(home: Path) -> Iterator[tuple[RunConfig, str]]:
    """The runs in `home` on own pictures that have been saved, each with the fingerprint of its data."""
    try:
        folders = sorted(entry.path for entry in os.scandir(home) if entry.is_dir())[:_MOST]
    except OSError:
        return
    for folder in map(Path, folders):
        try:
            newest = checkpoint.newest_manifest(folder)
            if newest is not None and "dataset" in newest.provenance:
                run = read_back(folder).model_copy(update={"run_dir": str(folder)})
                if isinstance(run.dataset, ImageFolder.Config):
                    yield run, newest.provenance["dataset"]
        except (InputError, OSError):  # whoever names it hears what is wrong there
            continue


class _Pictures:
    """The pictures that a command names, to be compared with those of runs."""

    def __init__(self, dataset: DatasetConfig):
        self._dataset = dataset

    def are_in(self, run: RunConfig, recorded: str) -> bool:
        """Whether a run that recorded this fingerprint learnt these pictures, whatever it made of them."""
        if not recorded.startswith(SCHEME):  # of 0.1.0, which told images apart by what it made of them
            return run.dataset.place == self._dataset.place
        here = run.dataset.at(self._dataset.place)
        try:
            found: ImageFolder = registry.build(here)
        except InputError:  # as where classes are wanted, and there are none
            return False
        return found.is_known_as(recorded)

    def digest(self) -> str:
        """Six hex digits of what the files are."""
        settings = self._dataset.whole().model_copy(update={"image_size": 64, "conditional": False})
        found: ImageFolder = registry.build(settings)
        return found.fingerprint().rpartition(":")[2][:6]
