"""Any folder or zip of images as a data set: nested, of mixed formats, modes and sizes."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.files import may_pass, patiently, unreadable
from ...core.progress import progress
from ...core.registry import register
from ...core.signals import heed
from ...core.terminal import say
from ...core.world import ALONE, World
from .. import fingerprint, former, image_labels, image_notes
from ..decoding import decode, prepare, reason, remarks
from ..folder_settings import ImageFolderConfig
from ..held_out import Held, held_out
from ..left_out import LeftOut
from ..open_files import open_files, sorted_names
from .base import Dataset, InMemory

_MAX_BAD_IN_A_ROW = 100
_CHUNK, _COMPARED = 32, 256  # images that a thread decodes, and that are compared, in one go


@register
class ImageFolder(Dataset):
    """Every image below `root`, scaled by its short side and cropped to the central square.

    Which of them these are, where some are held out, is settled by `load`; what classes there are, by all of them.

    Raises:
        InputError: no such folder or zip, no images in it, or no classes where labels are wanted.
    """

    Config = ImageFolderConfig

    def __init__(self, config: ImageFolderConfig, world: World = ALONE):
        prepare()
        size = config.image_size
        assert size != "auto", "settled by `facts`"
        self.config, self._world = config, world
        self.image_size: int = size
        self.channels, self.hflip = config.channels, config.hflip
        self._files = open_files(config.root)
        self._names = sorted_names(self._files, config.root)
        self.class_names: list[str] = []
        self._labels: Tensor | None = None
        if config.conditional:
            found = image_labels.label(self._files, self._names, config.root, config.class_level)
            self.class_names, self._labels = found
        self._whole = self._names, self._labels  # of all files, whichever of them these are
        self._chosen: Tensor | None = None  # which of those these are, where they are a part
        self.notes: list[str] = self._first_notes()
        self._left_out = LeftOut()
        self._remarks: dict[str, str] = {}  # of Pillow's, and the first file of each
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
        self.lazy = self._is_large()
        self._held: InMemory | None = None
        self._kept = torch.ones(len(self._names), dtype=torch.bool)  # which of the files are in `_held`
        self._seen = ""  # of the files' ends, once they were looked at

    def load(self, left_out: Path | None = None) -> None:
        if left_out is not None:
            self._left_out.write_to(left_out)
        if self.config.is_part and self._chosen is None:
            self._choose()
        if not self.lazy and self._held is None:
            self._held = self._decode_all()

    def __len__(self) -> int:
        return len(self._names) if self._held is None else len(self._held)

    @property
    def file_names(self) -> list[str]:
        """Relative paths of the files that these are made of, those that can't be decoded among them."""
        return self._names

    @property
    def names(self) -> list[str]:
        """For each image its file's relative path; on the fly another one may stand in for a file that is broken."""
        return [name for name, is_kept in zip(self._names, self._kept.tolist(), strict=True) if is_kept]

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._held is not None:
            return self._held.gather(index)
        found = list(self._pool.map(self._decode_near, index.tolist()))
        images = self._host(torch.stack([image for _, image in found]))
        return images, None if self._labels is None else self._host(self._labels[[where for where, _ in found]])

    def all_labels(self) -> Tensor | None:
        return self._labels if self._held is None else self._held.labels

    def to(self, device: torch.device | str) -> "ImageFolder":
        super().to(device)
        if self._held is not None:
            self._held.to(device)
        return self

    def fingerprint(self) -> str:
        """See `Dataset`: of the files, so the same in memory and on the fly, and in a folder and a zip of them.

        It is made of their relative names, sizes, first and last 4 KiB and labels, and of how they are decoded. A file
        that is broken counts like any other: what is left out follows from the files, skip_broken and max_megapixels.
        That of a part begins with that of the whole.
        """
        return self._fingerprint(self.class_names, self._whole[1])

    def is_known_as(self, recorded: str) -> bool:
        return self._is_name(recorded, self.class_names, self._whole[1])

    def shares_images_with(self, recorded: str) -> bool:
        if recorded.startswith(fingerprint.SCHEME):
            return fingerprint.of_whole(recorded) == fingerprint.of_whole(self.fingerprint())
        whole = ImageFolder(self.config.whole()) if self.config.is_part else self  # earlier versions held nothing out
        return whole.is_known_as(recorded)

    def was_known_as(self, recorded: str) -> bool:
        """See `Dataset`; a run that has learnt other labels of the same images keeps them."""
        for class_names, labels in filter(None, [(self.class_names, self._whole[1]), self._first_labels()]):
            if self._world.run_on_main(lambda: self._is_name(recorded, class_names, labels)):  # noqa: B023 - called at once
                self.class_names, self._whole = class_names, (self._whole[0], labels)
                if labels is not None:
                    self._labels = labels if self._chosen is None else labels[self._chosen]
                if self._held is not None and self._labels is not None:
                    self._held = self._held.relabelled(class_names, self._labels[self._kept])
                return True
        return False

    def _fingerprint(self, class_names: list[str], labels: Tensor | None) -> str:
        c, (names, _) = self.config, self._whole
        digest = None if labels is None else hashlib.sha256(labels.numpy().data).hexdigest()
        self._seen = self._seen or fingerprint.of_ends(self._files, names)
        settings = c.image_size, c.channels, c.background, class_names, digest
        whole = fingerprint.of_images(self._files, names, settings, self._seen)
        return fingerprint.of_part(whole, [c.part, c.holdout, c.group]) if c.is_part else whole

    def _is_name(self, recorded: str, class_names: list[str], labels: Tensor | None) -> bool:
        """Whether `recorded` is, or once was, the fingerprint of these images under these labels."""
        if recorded.startswith(fingerprint.SCHEME):
            return recorded == self._fingerprint(class_names, labels)
        if self.config.is_part:  # which earlier versions had none of
            return False
        c, first = self.config, self._first_labels()
        basis = c.image_size, c.channels, c.conditional, c.background
        settings = former.settings_of(basis, class_names, labels, None if first is None else first[1])
        return former.is_name_of(
            recorded, self._files, self._names, settings, lambda names: self._of_pixels(names, labels)
        )

    def _of_pixels(self, names: list[str], labels: Tensor | None) -> str:
        """What a set in memory was known by; its images are decoded for it where they aren't."""
        number, known = {name: i for i, name in enumerate(self.names)}, -1
        while len(self._left_out.reasons) != known:  # else a broken one was among them
            known = len(self._left_out.reasons)
            index = torch.tensor([number[name] for name in names if name in number and name not in self._left_out])
            shape = len(index), self.channels, self.image_size, self.image_size
            ordered = None if labels is None else labels[self._kept][index]
            found = fingerprint.of_pixels(shape, self._parts(index), ordered)
        return found

    def _parts(self, index: Tensor) -> Iterator[Tensor]:
        with progress(len(index), "comparing images") as bar:
            for some in index.split(_COMPARED):
                heed()
                yield self.gather(some)[0]
                bar.advance(len(some))

    def _first_labels(self) -> tuple[list[str], Tensor] | None:
        names, labels = self._whole
        return None if labels is None else former.first_labels(self._files, names, self.config.root)

    def _first_notes(self) -> list[str]:
        about = self._files, self._names, self.config.root, self.class_names, self._labels
        return list(image_notes.notes(*about))

    def _is_large(self) -> bool:
        return len(self._names) * self.channels * self.image_size**2 > self.config.memory_gb * 1e9

    def _choose(self) -> None:
        """Be the part that is wanted, the same on every rank."""
        c, (names, labels) = self.config, self._whole

        def look() -> tuple[Held, str]:
            digests = fingerprint.digests_of(self._files, names)
            return held_out(self._files, names, digests, c.share, c.group, c.root), fingerprint.together([digests])

        found, self._seen = self._world.run_on_main(look)
        is_chosen = found.mask if c.part == "held_out" else ~found.mask
        self._chosen = is_chosen.nonzero().flatten()
        self._names = [names[i] for i in self._chosen.tolist()]
        self._labels = None if labels is None else labels[self._chosen]
        self._kept = torch.ones(len(self._names), dtype=torch.bool)
        self.lazy = self._is_large()
        self.num_held_out = int(found.mask.sum()) if c.part == "train" else 0
        self.notes = [found.words, *self._first_notes()]

    def _decode_all(self) -> InMemory:
        world, num = self._world, len(self._names)
        share = -(-num // world.size)  # images of each rank; the last one may have fewer
        mine = range(min(num, world.rank * share), min(num, (world.rank + 1) * share))
        images = torch.empty(share * world.size, self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        whole = torch.zeros(share * world.size, dtype=torch.uint8)
        # Of the ends of each file, which is read here anyway; where they are a part, all were looked at before.
        seen = bytearray(share * world.size * fingerprint.DIGEST_BYTES) if self._chosen is None else None

        def fill(chunk: range) -> None:
            for i in chunk:
                heed()
                image = self._decode(i, seen)
                if image is not None:
                    images[i], whole[i] = image, 1
                elif seen is not None and not any(seen[_row(i)]):  # it could not even be read
                    seen[_row(i)] = fingerprint.look(self._files, self._names[i])

        def decode_mine() -> None:
            chunks = [mine[start : start + _CHUNK] for start in range(0, len(mine), _CHUNK)]
            with self._pool, progress(len(mine), "decoding images") as bar:
                for chunk, _ in zip(chunks, self._pool.map(fill, chunks), strict=True):
                    bar.advance(len(chunk))

        world.run_on_all(decode_mine)
        self._files.close()
        for shared in (images, whole):
            world.exchange_(shared)
        if seen is not None:
            world.exchange_(torch.frombuffer(seen, dtype=torch.uint8).view(-1, fingerprint.DIGEST_BYTES))
            self._seen = fingerprint.together([seen[: num * fingerprint.DIGEST_BYTES]])
        images, self._kept, labels = images[:num], whole[:num].bool(), self._labels
        if not self._kept.all():
            example = world.first_message(self._left_out.example())
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

    def _decode(self, i: int, seen: bytearray | None = None) -> Tensor | None:
        """Image i, uint8 [C, S, S]; None where it is broken and may be skipped.

        Args:
            seen: takes, at `_row(i)`, the digest of what its file begins and ends with, once that is read.
        """
        name, c = self._names[i], self.config
        try:
            data = patiently(lambda: self._files.read(name))
            if seen is not None:
                seen[_row(i)] = fingerprint.of_content(data)
            with remarks() as found:
                image = decode(data, self.image_size, c.channels, c.background, c.max_megapixels)
            self._pass_on(name, found)
            return image
        except Exception as error:  # a bad file makes Pillow raise nearly anything
            if may_pass(error):  # which says nothing about the image
                raise unreadable(f"image {name!r} in {c.root}", error) from None
            why = reason(error)
            if not c.skip_broken:
                fix = "repair or remove it, or leave out all such files with dataset.skip_broken=true"
                raise InputError(f"image {name!r} in {c.root} can't be decoded", why, fix=fix) from error
            if self._left_out.add(name, why) and self.lazy:
                self._left_out.say(name)
            return None


def _row(i: int) -> slice:
    """Where the digest of file i is among those of all."""
    return slice(i * fingerprint.DIGEST_BYTES, (i + 1) * fingerprint.DIGEST_BYTES)
