"""MNIST, Fashion-MNIST and CIFAR-10: fetched from where torchvision would, and known by what is in their files."""

import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from torch import Tensor

from ...core.downloads import alone_in, download
from ...core.errors import InputError
from ...core.files import is_there, may_pass, patiently, unreadable
from ...core.registry import register
from ...core.settings import MAY_CHANGE, NOT_IDENTITY
from ...core.world import ALONE, World
from .. import cifar_batches, idx_files
from .base import DatasetConfig, Facts
from .in_memory import InMemory


class PublishedConfig(DatasetConfig):
    """The `dataset` group for a set that can be downloaded."""

    is_published = True

    root: Annotated[str, MAY_CHANGE, NOT_IDENTITY] = "data"
    download: Annotated[bool, MAY_CHANGE, NOT_IDENTITY] = True
    split: Literal["train", "test"] = "train"
    shape: ClassVar[tuple[int, int]]  # side and channels of its images
    num_train: ClassVar[int]

    def known_facts(self) -> Facts:
        return Facts(*self.shape, self.num_train if self.split == "train" else 10_000, has_classes=True)

    def held_out(self) -> Self | None:
        return self.model_copy(update={"split": "test"}) if self.split == "train" else None


class _PublishedSet(InMemory):
    """A set whose archives torchvision's class of that name lists, with their md5 sums and mirrors.

    Archives are never unpacked to disk; what torchvision made of them is read too. Either is right if it holds what it
    should: whoever packs the same images again gets another md5.

    Raises:
        InputError: a file is missing and can't be downloaded, or is damaged.
    """

    source: ClassVar[str]  # the name of torchvision's class
    folder: ClassVar[str]  # where under the root its archives belong

    def __init__(self, config: PublishedConfig, world: World = ALONE):
        from torchvision import datasets

        self._config, self._published = config, getattr(datasets, self.source)
        self._home = Path(os.path.expanduser(config.root)) / self.folder
        archives = self._archives()
        missing = [name for name in archives if self._find(name) is None]
        parts: dict[str, tuple[Tensor, ...]] = {}
        others = []
        for name in sorted(archives, key=missing.__contains__):  # what is there is looked at before more is fetched
            if name in missing:
                self._fetch(name, archives[name], missing)
            parts[name], is_published = self._read_checked(name, archives[name])
            others += [] if is_published else [name]
        if others:
            self.notes = [f"{', '.join(others)}: another md5 than published, but the contents are sound, so used"]
        images, labels = (tensor for name in archives for tensor in parts[name])
        super().__init__(images, labels.long() if config.conditional else None, self._names(), config.hflip)

    @abstractmethod
    def _archives(self) -> Mapping[str, str]:
        """Names and md5 sums of the archives that hold the split: together its images, then its labels."""

    @abstractmethod
    def _unpacked(self, name: str) -> str:
        """What torchvision makes of an archive."""

    @abstractmethod
    def _mirrors(self) -> list[str]:
        """What an archive's name is appended to."""

    @abstractmethod
    def _names(self) -> list[str]:
        """Of the classes."""

    @abstractmethod
    def _read(self, path: Path) -> tuple[Tensor, ...]:
        """What an archive, or what became of it, holds. Raises any Exception where that is not what it should be."""

    def _find(self, name: str) -> Path | None:
        """Where an archive is, or what was made of it."""
        try:
            return next((p for n in (self._unpacked(name), name) if is_there(p := self._home / n)), None)
        except OSError as error:
            raise unreadable(self._home, error) from None

    def _read_checked(self, name: str, md5: str) -> tuple[tuple[Tensor, ...], bool]:
        """What an archive holds, and whether it is the one published, as far as can be told."""
        from torchvision.datasets.utils import check_integrity

        path = self._find(name) or self._home / name
        try:
            return patiently(lambda: (self._read(path), path.name != name or check_integrity(path, md5)))
        except MemoryError:
            raise
        except Exception as error:  # a damaged file makes gzip and tarfile raise nearly anything
            if may_pass(error):
                raise unreadable(path, error) from None
            at_hand = self._config.download or (path.name != name and is_there(self._home / name))
            fix = "delete it and run again" if at_hand else f"delete it, then {self._put([name])}"
            what = f"{path.name} in {self._home} is damaged, or another file"
            raise InputError(what, str(error) or type(error).__name__, fix=fix) from error

    def _fetch(self, name: str, md5: str, missing: list[str]) -> None:
        what = f"{self.source} is not in {self._home}"
        if not self._config.download:
            raise InputError(what, fix=f"dataset.download=true, or {self._put(missing)}")
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with alone_in(self._home, self.source):
                if self._find(name) is None:  # else another rank has fetched it meanwhile
                    urls = [mirror + name for mirror in self._mirrors()]
                    download(urls, self._home / name, "md5", md5, self.source)
        except OSError as error:
            raise InputError(f"{what} and can't be downloaded", str(error), fix=self._put(missing)) from None

    def _put(self, names: list[str]) -> str:
        return f"put {', '.join(names)} into {self._home}, or set dataset.root to where {self.source} is"


class _IdxSet(_PublishedSet):
    counts: ClassVar = {"train": 60_000, "test": 10_000}

    def _archives(self) -> Mapping[str, str]:
        start = {"train": "train-", "test": "t10k-"}[self._config.split]
        return {name: md5 for name, md5 in self._published.resources if name.startswith(start)}

    def _unpacked(self, name: str) -> str:
        return name.removesuffix(".gz")

    def _mirrors(self) -> list[str]:
        return self._published.mirrors

    def _names(self) -> list[str]:
        return list(self._published.classes)

    def _read(self, path: Path) -> tuple[Tensor, ...]:
        count = self.counts[self._config.split]
        if "images" in path.name:
            return (idx_files.read(path, count, 28, 28)[:, None],)
        labels = idx_files.read(path, count)
        if labels.max() > 9:
            raise ValueError(f"holds the label {labels.max()}, which is none of 0 to 9")
        return (labels,)


@register
class MNIST(_IdxSet):
    """Handwritten digits, 28x28 grey: LeCun et al. 1998."""

    class Config(PublishedConfig):
        name: Literal["mnist"] = "mnist"
        shape, num_train = (28, 1), 60_000

    source, folder = "MNIST", "MNIST/raw"


@register
class FashionMNIST(_IdxSet):
    """Pictures of clothes, 28x28 grey: Xiao et al. 2017."""

    class Config(PublishedConfig):
        name: Literal["fashion_mnist"] = "fashion_mnist"
        shape, num_train = (28, 1), 60_000

    source, folder = "FashionMNIST", "FashionMNIST/raw"


@register
class CIFAR10(_PublishedSet):
    """Photographs of ten kinds of thing, 32x32 colour: Krizhevsky 2009."""

    class Config(PublishedConfig):
        name: Literal["cifar10"] = "cifar10"
        hflip: Annotated[bool, NOT_IDENTITY] = True
        shape, num_train = (32, 3), 50_000

    source, folder = "CIFAR10", ""
    rows: ClassVar = 10_000  # images of a batch

    def _archives(self) -> Mapping[str, str]:
        return {self._published.filename: self._published.tgz_md5}

    def _unpacked(self, name: str) -> str:
        return self._published.base_folder

    def _mirrors(self) -> list[str]:
        return [self._published.url.removesuffix(self._published.filename)]

    def _names(self) -> list[str]:
        return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def _read(self, path: Path) -> tuple[Tensor, ...]:
        batches = self._published.train_list if self._config.split == "train" else self._published.test_list
        return cifar_batches.read(path, [name for name, _ in batches], self.rows)
