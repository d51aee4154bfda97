"""Any folder or zip of images as a data set: nested, of mixed formats, modes and sizes."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import fingerprint
from ..distributed import ALONE, World
from ..errors import InputError
from ..files import may_pass, patiently, unreadable
from ..image_files import SUFFIXES, decode, open_files, reason
from ..registry import Settings, register
from ..tracking import progress
from .base import Dataset, InMemory

_MAX_BAD_IN_A_ROW = 100
_CHUNK = 32  # images a thread decodes in one go


@register("dataset", "image_folder")
class ImageFolder(Dataset):
    """Every image below `root`, scaled by its short side and cropped to the central square.

    Alone it is ready when it is built; ranks of one run `load` it together, each decoding its share.

    Raises:
        InputError: no such folder or zip, no images in it, no class folders where labels are wanted, or an image
            that can't be decoded.
    """

    class Config(Settings):
        root: str  # a folder or a .zip, which is read in place
        image_size: Annotated[int, Field(ge=1, le=4096)] = 64
        channels: Literal[1, 3] = 3
        conditional: bool = False  # labels are the names of the first-level folders, sorted
        hflip: bool = True
        background: Annotated[int, Field(ge=0, le=255)] = 255  # grey level behind transparency; white, as on a page
        skip_broken: bool = False  # leave out what can't be decoded, with a warning
        memory_gb: Annotated[float, Field(ge=0)] = 4.0  # larger sets (decoded, in 1e9 bytes) are decoded on the fly

    def __init__(self, config: Config, world: World = ALONE):
        from PIL import Image

        Image.init()  # here, since loading Pillow's plugins is not made for threads
        self.config, self._world = config, world
        self.image_size, self.channels, self.hflip = config.image_size, config.channels, config.hflip
        self._files = open_files(config.root)
        self._names = sorted(self._files.identities)
        if not self._names:
            raise InputError("no images found", config.root, f"files that end in {' '.join(SUFFIXES)}")
        self.class_names: list[str] = []
        self._labels: Tensor | None = None
        if config.conditional:
            self.class_names, self._labels = _label(self._names, config.root)
        self._broken: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
        self.lazy = len(self._names) * self.channels * self.image_size**2 > config.memory_gb * 1e9
        self._held: InMemory | None = None
        if world.size == 1:
            self.load()

    def load(self) -> None:
        if not self.lazy and self._held is None:
            self._held = self._decode_all()

    def __len__(self) -> int:
        return len(self._names) if self._held is None else len(self._held)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._held is not None:
            return self._held.gather(index)
        found = list(self._pool.map(self._decode_near, index.tolist()))
        images = self._host(torch.stack([image for _, image in found]))
        return images, None if self._labels is None else self._host(self._labels[[where for where, _ in found]])

    def to(self, device: torch.device | str) -> "ImageFolder":
        super().to(device)
        if self._held is not None:
            self._held.to(device)
        return self

    def fingerprint(self) -> str:
        """A sha256 in hex: of pixels and labels where they are in memory, else of files and settings."""
        if self._held is not None:
            return self._held.fingerprint()
        return fingerprint.of_files(self._files, self._names, self._settings(), self._pool)

    def was_known_as(self, recorded: str) -> bool:
        # The first versions looked at no bytes of a set that is decoded on the fly.
        return self.lazy and recorded == fingerprint.of_listing(self._files, self._names, self._settings())

    def _settings(self) -> tuple[object, ...]:
        c = self.config
        return c.image_size, c.channels, c.conditional, c.background

    def _decode_all(self) -> InMemory:
        world, num = self._world, len(self._names)
        share = -(-num // world.size)  # images of each rank; the last one may have fewer
        mine = range(min(num, world.rank * share), min(num, (world.rank + 1) * share))
        images = torch.empty(share * world.size, self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        whole = torch.zeros(share * world.size, dtype=torch.uint8)

        def fill(chunk: range) -> None:
            for i in chunk:
                image = self._decode(i)
                if image is not None:
                    images[i], whole[i] = image, 1

        def decode_mine() -> None:
            chunks = [mine[start : start + _CHUNK] for start in range(0, len(mine), _CHUNK)]
            with self._pool, progress(len(mine), "decoding images") as bar:
                for chunk, _ in zip(chunks, self._pool.map(fill, chunks), strict=True):
                    bar.advance(len(chunk))

        world.agree(decode_mine)
        self._files.close()
        for shared in (images, whole):
            world.exchange_(shared)
        images, kept, labels = images[:num], whole[:num].bool(), self._labels
        if not kept.all():
            example = world.first_of(self._example() if self._broken else "")
            if not kept.any():
                raise InputError("none of the images can be decoded", example, fix="look at dataset.root")
            if world.is_main:
                left_out = num - int(kept.sum())
                warnings.warn(f"left out {left_out} of {num} images, e.g. {example}", stacklevel=3)
            images, labels = images[kept], None if labels is None else labels[kept]
        return InMemory(images, labels, self.class_names, self.hflip)

    def _decode_near(self, i: int) -> tuple[int, Tensor]:
        """Image i and its index, or the next one that is whole: a broken file found late must not move the others."""
        for j in range(i, i + _MAX_BAD_IN_A_ROW):
            where = j % len(self._names)
            known = self._names[where] in self._broken
            image = None if known else self._decode(where)
            if image is not None:
                return where, image
            if not known:
                warnings.warn(f"another image stands in for {self._names[where]!r}, which is broken", stacklevel=2)
        raise InputError(f"{_MAX_BAD_IN_A_ROW} images in a row can't be decoded", self._example())

    def _decode(self, i: int) -> Tensor | None:
        """Image i, uint8 [C, S, S]; None where it is broken and may be skipped."""
        name, c = self._names[i], self.config
        try:
            data = patiently(lambda: self._files.read(name))
            return decode(data, c.image_size, c.channels, c.background)
        except Exception as error:  # a bad file makes Pillow raise nearly anything
            if may_pass(error):  # which says nothing about the image
                raise unreadable(f"image {name!r} in {c.root}", error) from None
            self._broken[name] = reason(error)
            if c.skip_broken:
                return None
            raise InputError(
                f"image {name!r} in {c.root} can't be decoded",
                self._broken[name],
                fix="repair or remove it, or leave out all such files with dataset.skip_broken=true",
            ) from error

    def _example(self) -> str:
        name, reason = min(self._broken.copy().items())  # a copy, since other threads may add to it
        return f"{name!r} ({reason})"


def _label(names: list[str], root: str) -> tuple[list[str], Tensor]:
    """Class names and a label for each file, by the first folders that divide the files."""
    paths = [name.split("/") for name in names]
    depth = 0
    while len({path[depth] for path in paths}) == 1 and all(len(path) > depth + 1 for path in paths):
        depth += 1
    stray = [name for name, path in zip(names, paths, strict=True) if len(path) < depth + 2]
    if stray:
        raise InputError(
            "dataset.conditional=true needs every image in a folder of its class",
            f"{len(stray)} of {len(names)} images outside of any, e.g. {stray[0]!r} in {root}",
            "two folders or more, one a class",
        )
    classes = sorted({path[depth] for path in paths})
    number = {name: i for i, name in enumerate(classes)}
    return classes, torch.tensor([number[path[depth]] for path in paths])
