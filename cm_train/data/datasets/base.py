"""What every data set offers, and the data set that is held in memory whole."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from ...core import registry, rng
from ...core.errors import InputError
from ...core.progress import progress
from ...core.registry import ComponentConfig
from ...core.settings import NOT_IDENTITY
from ...core.signals import heed

_SIGMA_IMAGES = 4096  # how many images of a set that is decoded on the fly are enough for its sigma_data
_LISTED = 12  # names that are shown of many
_SIGMA_PIXELS = 2**22  # values looked at in one go, so that a set that is decoded on the fly needs little memory


@dataclass(frozen=True)
class Facts:
    """What settings are settled by.

    Attributes:
        image_size: side of the images, as networks will see them.
        count: how many there are to be trained on, about.
        remarks: what a person should hear of what was settled, in sentences.
        held_out: the share of them all that nobody trains on.
        has_classes: whether they have labels, whether or not a network is told of them.
    """

    image_size: int
    channels: int
    count: int
    remarks: tuple[str, ...] = ()
    held_out: float = 0.0
    has_classes: bool = False


class DatasetConfig(ComponentConfig):
    """The `dataset` group."""

    kind: ClassVar = "dataset"
    is_published: ClassVar[bool] = False  # whether anybody may have its images anyway; else nobody is sent them unasked

    conditional: bool = False  # whether the network is told the class of each image
    hflip: Annotated[bool, NOT_IDENTITY] = False  # random horizontal flips

    @property
    def place(self) -> str | None:
        """Where the files lie; None for a set that comes with a package."""
        root: str | None = getattr(self, "root", None)
        return root

    @property
    def run_name(self) -> str:
        """What runs on this set are called after."""
        return self.name

    def known_facts(self) -> Facts | None:
        """What is known of the images without a look at any; None where that takes one."""
        return None

    def facts(self, largest: int) -> Facts:
        """What a look at the images tells, few of them where there are many.

        Args:
            largest: the side that images have at most where nobody has set it.

        Raises:
            InputError: there are none.
        """
        if known := self.known_facts():
            return known
        dataset: Dataset = registry.build(self)
        return Facts(dataset.image_size, dataset.channels, len(dataset), has_classes=dataset.num_classes > 0)

    def at(self, place: str | None) -> Self:
        """The same set where its files lie elsewhere."""
        return self if place is None or self.place is None else self.model_copy(update={"root": place})

    def held_out(self) -> Self | None:
        """The settings of the images that nobody trains on who trains on these; None where there are none."""
        return None

    def whole(self) -> Self:
        """The settings of all images, none of them held out."""
        return self

    def check_for_training(self) -> None:
        """Raises InputError for images that no run may learn."""

    def identity(self) -> dict[str, Any]:
        """The settings that say which images and labels there are, wherever they lie."""
        return self.model_dump(exclude=self.marked(NOT_IDENTITY))


class Dataset(ABC):
    """Square uint8 images of one size, addressed by index. Built as `cls(config, world)`.

    Attributes:
        image_size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        class_names: one name a label, in the order of the labels; empty where there are no labels.
        hflip: whether the set wants random horizontal flips; whoever trains does the flipping.
        lazy: whether `gather` decodes files, so that fetching ahead pays.
        device: where batches are wanted.
        notes: what a person should hear of the set, beside its `summary`.
        num_held_out: how many images more there are that nobody trains on, as far as these are a part of one set.
    """

    image_size: int
    channels: int
    class_names: list[str]
    hflip: bool
    lazy: bool = False
    device: torch.device = torch.device("cpu")
    notes: Sequence[str] = ()
    num_held_out: int = 0

    def load(self, left_out: Path | None = None) -> None:  # noqa: B027 - most sets have nothing left to read
        """Read what building has left to read, each rank its share: call it before anything else.

        Args:
            left_out: a file in which the set writes down what it can't use and goes on without.

        Raises:
            InputError: an image can't be read, on every rank where that happens to one.
            Stopped: see `signals.heed`.
        """

    def summary(self) -> str:
        """How many images and which classes, in words."""
        classes = f"{self.num_classes:,} classes: {listed(self.class_names)}" if self.class_names else "no classes"
        return f"{len(self):,} images, {classes}"

    @property
    def num_classes(self) -> int:
        """How many labels there are; 0 where `gather` gives none."""
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and labels at `index`.

        Args:
            index: int64 [B] on the CPU, each in [0, len).

        Returns:
            uint8 [B, C, H, W] and int64 [B] (None where num_classes is 0): on `device` where the set lives there,
            else on the CPU, and pinned where `device` is a CUDA device.
        """

    def all_labels(self) -> Tensor | None:
        """The labels of all images, int64 [N], where they are at hand without reading them."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """What changes with the images, their order or their labels: two sets are the same when theirs are."""

    def is_known_as(self, recorded: str) -> bool:
        """Whether `recorded` is this very set's fingerprint, by this version or an earlier one."""
        return recorded == self.fingerprint()

    def shares_images_with(self, recorded: str) -> bool:
        """Whether `recorded` is the fingerprint of these images, be it with other ones held out."""
        return self.is_known_as(recorded)

    def was_known_as(self, recorded: str) -> bool:
        """Whether a run that recorded this fingerprint learnt this set; it then is as it was there, on every rank."""
        return self.is_known_as(recorded)

    def to(self, device: torch.device | str) -> "Dataset":
        """Prepare for batches on `device`; returns the set itself."""
        self.device = torch.device(device)
        return self

    def sigma_data(self) -> float:
        """Standard deviation of all pixel values in [-1, 1] about their mean, of a fixed subset where lazy.

        Raises:
            InputError: every pixel has the same value.
        """
        index = torch.arange(len(self))
        if self.lazy and len(self) > _SIGMA_IMAGES:
            index = rng.permutation(0, "sigma_data", 0, len(self))[:_SIGMA_IMAGES].sort().values
        counts = torch.zeros(256, dtype=torch.int64)  # exact, and so the same on every device
        with progress(len(index), "measuring contrast, images") as bar:
            for some in index.split(max(1, _SIGMA_PIXELS // (self.channels * self.image_size**2))):
                heed()
                counts += self.gather(some)[0].flatten().bincount(minlength=256).cpu()
                bar.advance(len(some))
        level = torch.arange(256, dtype=torch.float64)
        mean = (counts * level).sum() / counts.sum()
        variance = float((counts * (level - mean).square()).sum() / counts.sum())
        if counts.count_nonzero() == 1:
            raise InputError("the data set has one colour only", f"{len(self)} images without any contrast")
        return variance**0.5 / 127.5

    def _host(self, tensor: Tensor) -> Tensor:
        """`tensor`, pinned where it will go to a CUDA device: only then does the copy not hold up the program."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def listed(names: Sequence[str]) -> str:
    """Names with commas between them, the first ones of many."""
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
