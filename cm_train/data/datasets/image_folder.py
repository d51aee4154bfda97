"""Any folder or zip of images as a data set: nested, of mixed formats, modes and sizes."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...core.errors import InputError
from ...core.files import may_pass, patiently, unreadable
from ...core.progress import progress
from ...core.registry import register
from ...core.settings import MAY_CHANGE, NOT_IDENTITY, Count, Text
from ...core.signals import heed
from ...core.terminal import say
from ...core.world import ALONE, World
from .. import fingerprint, image_labels
from ..decoding import MAX_MEGAPIXELS, decode, prepare, reason, remarks
from ..image_files import SUFFIXES, open_files
from ..left_out import LeftOut
from .base import Dataset, DatasetConfig, InMemory, listed

_MAX_BAD_IN_A_ROW = 100
_CHUNK = 32  # images a thread decodes in one go


@register
class ImageFolder(Dataset):
    """Every image below `root`, scaled by its short side and cropped to the central square.

    Raises:
        InputError: no such folder or zip, no images in it, or no classes where labels are wanted.
    """

    class Config(DatasetConfig):
        name: Literal["image_folder"] = "image_folder"
        root: Annotated[Text, MAY_CHANGE, NOT_IDENTITY]  # a folder, a .zip, which is read in place, or a folder in one
        image_size: Annotated[int, Field(ge=1, le=4096)] = 64
        channels: Literal[1, 3] = 3
        conditional: bool = False  # labels, of dataset.json where there is one, else of folders
        class_level: Annotated[Count | None, MAY_CHANGE] = (
            None  # which folder of a path is its class; None: the first that divides the images
        )
        hflip: Annotated[bool, NOT_IDENTITY] = True
        background: Annotated[int, Field(ge=0, le=255)] = 255  # grey level behind transparency; white, as on a page
        skip_broken: Annotated[bool, MAY_CHANGE, NOT_IDENTITY] = (
            False  # leave out what can't be decoded, with a warning
        )
        # larger images count as broken
        max_megapixels: Annotated[float, Field(gt=0, le=100_000), MAY_CHANGE, NOT_IDENTITY] = MAX_MEGAPIXELS
        memory_gb: Annotated[float, Field(ge=0), NOT_IDENTITY] = (
            4.0  # larger sets (decoded, in 1e9 bytes) are decoded on the fly
        )

    def __init__(self, config: Config, world: World = ALONE):
        prepare()
        self.config, self._world = config, world
        self.image_size, self.channels, self.hflip = config.image_size, config.channels, config.hflip
        self._files = open_files(config.root)
        self._names = sorted(self._files.identities)
        unread = ", ".join(f"{len(n)} {ending} (as {min(n)!r})" for ending, n in sorted(self._files.unread.items()))
        if not self._names:
            got = f"{config.root}, which has {unread}" if unread else config.root
            raise InputError("no images found", got, f"files that end in {' '.join(SUFFIXES)}")
        self.class_names: list[str] = []
        self._labels: Tensor | None = None
        if config.conditional:
            found = image_labels.label(self._files, self._names, config.root, config.class_level)
            self.class_names, self._labels = found
        self.notes: list[str] = list(self._find_notes(unread))
        self._left_out = LeftOut()
        self._remarks: dict[str, str] = {}  # of Pillow's, and the first file of each
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
        self.lazy = len(self._names) * self.channels * self.image_size**2 > config.memory_gb * 1e9
        self._held: InMemory | None = None
        self._kept = torch.ones(len(self._names), dtype=torch.bool)  # which of the files are in `_held`

    def _find_notes(self, unread: str) -> Iterator[str]:
        if unread:
            yield f"not read are {unread}; PNG, JPEG and WebP are, among others"
        if self._files.doubled:
            yield f"members whose names come again are left out, the last is taken: {self._files.doubled}"
        if self.config.conditional:
            counts = torch.bincount(self._labels, minlength=len(self.class_names)) if self._labels is not None else ()
            empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
            if empty:
                yield f"no image is of {'class' if len(empty) == 1 else 'classes'} {listed(empty)}"
            return
        if self._files.label_files:
            where = min(self._files.label_files, key=len)
            yield f"its {where} is not used; dataset.conditional=true takes the labels that it has, if any"
            return
        folders = image_labels.folders(self._names)
        names = [f"{name} ({folders[name]:,})" for name in sorted(folders, key=image_labels.in_natural_order)]
        if image_labels.are_parts(list(folders)):
            yield f"it has all of {listed(names)}; dataset.root={self.config.root}/... takes one of them"
        elif names:
            yield f"its folders {listed(names)} give no labels; dataset.conditional=true makes them classes"

    def load(self, left_out: Path | None = None) -> None:
        if left_out is not None:
            self._left_out.write_to(left_out)
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
        """See `Dataset`; a run that has learnt other labels of the same images keeps them."""
        first, held = self._first_labels(), self._held
        if held is not None:
            relabelled = None if first is None else held.relabelled(first[0], first[1][self._kept])
            if relabelled is None or relabelled.fingerprint() != recorded:
                return False
            self._held = relabelled
        else:
            what = self._files, self._names, self._basis()
            if recorded not in (fingerprint.of_listing(*what), fingerprint.of_files(*what, self._pool)):
                return False
        if first is not None:
            self.class_names, self._labels = first
        return True

    def _basis(self) -> tuple[object, ...]:
        c = self.config
        return c.image_size, c.channels, c.conditional, c.background

    def _settings(self) -> tuple[object, ...]:
        """What decides about images and labels: of the latter nothing where they are as the first versions had them."""
        first = self._first_labels()
        if self._labels is None or (first is not None and first[1].equal(self._labels)):
            return self._basis()
        return *self._basis(), self.class_names, hashlib.sha256(self._labels.numpy().data).hexdigest()

    def _first_labels(self) -> tuple[list[str], Tensor] | None:
        """Class names and labels as the first versions gave them, which sorted folders as text and knew no lists."""
        if self._labels is None:
            return None
        level = 1 + image_labels.dividing_level(self._names)
        try:
            return image_labels.by_folder(self._names, self.config.root, level, order=str)
        except InputError:
            return None

    def _decode_all(self) -> InMemory:
        world, num = self._world, len(self._names)
        share = -(-num // world.size)  # images of each rank; the last one may have fewer
        mine = range(min(num, world.rank * share), min(num, (world.rank + 1) * share))
        images = torch.empty(share * world.size, self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        whole = torch.zeros(share * world.size, dtype=torch.uint8)

        def fill(chunk: range) -> None:
            for i in chunk:
                heed()
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
        images, self._kept, labels = images[:num], whole[:num].bool(), self._labels
        if not self._kept.all():
            example = world.first_of(self._left_out.example())
            if not self._kept.any():
                raise InputError("none of the images can be decoded", example, fix="look at dataset.root")
            count = num - int(self._kept.sum())
            left_out = f"left out {count:,} of {num:,} images that can't be decoded, as {example}"
            self.notes.append(left_out + self._left_out.all_in())
            images, labels = images[self._kept], None if labels is None else labels[self._kept]
        return InMemory(images, labels, self.class_names, self.hflip)

    def _decode_near(self, i: int) -> tuple[int, Tensor]:
        """Image i and its index, or the next one that is whole: a broken file found late must not move the others."""
        for j in range(i, i + _MAX_BAD_IN_A_ROW):
            where = j % len(self._names)
            name = self._names[where]
            image = None if name in self._left_out else self._decode(where)
            if image is not None:
                return where, image
        raise InputError(f"{_MAX_BAD_IN_A_ROW} images in a row can't be decoded", self._left_out.example())

    def _pass_on(self, name: str, found: list[str]) -> None:
        """Say what Pillow remarks on a file that it can read: each remark once, of the first file."""
        for remark in set(map(str.strip, found)) if self._world.is_main else ():
            if self._remarks.setdefault(remark, name) == name:
                say(f"note: {name!r} is read, but {remark!r}, says Pillow; of others like it no more is said")

    def _decode(self, i: int) -> Tensor | None:
        """Image i, uint8 [C, S, S]; None where it is broken and may be skipped."""
        name, c = self._names[i], self.config
        try:
            data = patiently(lambda: self._files.read(name))
            with remarks() as found:
                image = decode(data, c.image_size, c.channels, c.background, c.max_megapixels)
            self._pass_on(name, found)
            return image
        except Exception as error:  # a bad file makes Pillow raise nearly anything
            if may_pass(error):  # which says nothing about the image
                raise unreadable(f"image {name!r} in {c.root}", error) from None
            why = reason(error)
            if not c.skip_broken:
                raise InputError(
                    f"image {name!r} in {c.root} can't be decoded",
                    why,
                    fix="repair or remove it, or leave out all such files with dataset.skip_broken=true",
                ) from error
            if self._left_out.add(name, why) and self.lazy:
                self._left_out.say(name)
            return None
