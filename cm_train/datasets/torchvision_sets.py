"""MNIST, Fashion-MNIST and CIFAR-10, downloaded and checked by torchvision."""

import io
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from ..distributed import ALONE, World
from ..errors import InputError
from ..files import may_pass, patiently, unreadable
from ..registry import Settings, register
from ..tracking import watched
from .base import InMemory

_TIMEOUT_S = 30.0  # torchvision sets none, and a silent server would hang the run for ever


class _Config(Settings):
    root: str = "data"
    download: bool = True
    split: Literal["train", "test"] = "train"
    conditional: bool = False
    hflip: bool = False


class _FlippedConfig(_Config):
    hflip: bool = True


class _TorchvisionSet(InMemory):
    """One of torchvision's classes, read whole.

    Raises:
        InputError: the files are missing and can't be downloaded, or damaged.
    """

    source: str  # the name of torchvision's class
    folder: str  # where under the root its archives belong

    def __init__(self, config: _Config, world: World = ALONE):
        from torchvision import datasets
        from torchvision.datasets.utils import check_integrity

        cls = getattr(datasets, self.source)
        root = Path(os.path.expanduser(config.root))
        archives = {root / self.folder / name: md5 for name, md5 in _archives(cls)}
        try:
            # Around the lock: rank 0 shows what another rank may be downloading.
            with watched(root / self.folder, self.source), _one_at_a_time(root, config.download), _quiet():
                # Archives that are all there need no network, so they are unpacked whether or not it may be used.
                ready = config.download or all(check_integrity(path, md5) for path, md5 in archives.items())
                found = patiently(lambda: cls(str(root), train=config.split == "train", download=ready))
            images, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets, dtype=torch.int64)
            if not 0 < len(images) == len(labels):
                raise ValueError(f"{len(images)} images, {len(labels)} labels")
        except Exception as error:  # a bad file makes torchvision raise nearly anything
            if may_pass(error):
                raise unreadable(root, error) from None
            raise self._explain(cls, root, archives, config.download, error) from error
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        super().__init__(images, labels if config.conditional else None, list(found.classes), config.hflip)

    def _explain(self, cls: Any, root: Path, archives: dict[Path, str], download: bool, error: Exception) -> InputError:
        from torchvision.datasets.utils import check_integrity

        home = root / self.folder
        missing = [path.name for path in archives if not path.is_file()]
        damaged = [p.name for p, md5 in archives.items() if p.is_file() and not check_integrity(p, md5)]
        put = f"put {', '.join(damaged or missing)} into {home}, or set dataset.root to where {self.source} is"
        if damaged:
            what, fix = f"{', '.join(damaged)} in {home} is damaged", f"delete it, then {put}"
        elif all((home / name).exists() for name in _unpacked(cls)):
            what, fix = f"{self.source} in {home} is damaged", f"delete {', '.join(_unpacked(cls))} there and run again"
        elif missing:
            what = f"{self.source} is not in {home}" + (" and can't be downloaded" if download else "")
            fix = put if download else f"dataset.download=true, or {put}"
        else:
            what, fix = f"{self.source} can't be unpacked in {home}", "set dataset.root to a folder with room to write"
        return InputError(what, str(error).strip().rpartition("\n")[2] or type(error).__name__, fix=fix)


def _archives(cls: Any) -> list[tuple[str, str]]:
    """What torchvision downloads: names and md5 sums."""
    return cls.resources if hasattr(cls, "resources") else [(cls.filename, cls.tgz_md5)]


def _unpacked(cls: Any) -> list[str]:
    """What torchvision makes of its archives."""
    return [name.removesuffix(".gz") for name, _ in cls.resources] if hasattr(cls, "resources") else [cls.base_folder]


@contextmanager
def _one_at_a_time(root: Path, create: bool) -> Iterator[None]:
    """Hold a lock on `root`: the ranks of a run start together, and only one of them may download and unpack."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # no such folder, or a system or disk without locks
            import fcntl

            if create:
                root.mkdir(parents=True, exist_ok=True)
            folder = os.open(root, os.O_RDONLY)  # the folder itself, so that no lock file is left in it
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torchvision's progress bars off the terminal, and give its connections a time limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


@register("dataset", "mnist")
class MNIST(_TorchvisionSet):
    """Handwritten digits, 28x28 grey: LeCun et al. 1998."""

    Config = _Config
    source, folder = "MNIST", "MNIST/raw"


@register("dataset", "fashion_mnist")
class FashionMNIST(_TorchvisionSet):
    """Pictures of clothes, 28x28 grey: Xiao et al. 2017."""

    Config = _Config
    source, folder = "FashionMNIST", "FashionMNIST/raw"


@register("dataset", "cifar10")
class CIFAR10(_TorchvisionSet):
    """Photographs of ten kinds of thing, 32x32 colour: Krizhevsky 2009."""

    Config = _FlippedConfig
    source, folder = "CIFAR10", ""
