"""Any folder or zip of images as a data set: nested, of mixed formats, modes and sizes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...core.progress import progress
from ...core.registry import register
from ...core.signals import heed
from ...core.world import ALONE, World
from .. import fingerprint, former, image_labels, image_notes
from ..decoder import Decoder
from ..folder_settings import ImageFolderConfig
from ..held_out import Held, held_out
from ..open_files import open_files, sorted_names
from .base import Dataset
from .in_memory import InMemory

_COMPARED = 256  # images that are compared in one go


@register
class ImageFolder(Dataset):
    """Every image below `root`, scaled by its short side and cropped to the central square.

    Which of them these are, where some are held out, is settled by `load`; what classes there are, by all of them.

    Raises:
        InputError: no such folder or zip, no images in it, or no classes where labels are wanted.
    """

    Config = ImageFolderConfig

    def __init__(self, config: ImageFolderConfig, world: World = ALONE):
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
        self._decoder = Decoder(self._files, config, world)
        self.lazy = self._is_large()
        self._held: InMemory | None = None
        self._kept = torch.ones(len(self._names), dtype=torch.bool)  # which of the files are in `_held`
        self._seen = ""  # of the files' ends, once they were looked at

    def load(self, left_out: Path | None = None) -> None:
        if left_out is not None:
            self._decoder.left_out.write_to(left_out)
        if self.config.is_part and self._chosen is None:
            self._choose()
        if not self.lazy and self._held is None:
            self._held = self._in_memory()

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
        images, where = self._decoder.some(self._names, index)
        return self._host(images), None if self._labels is None else self._host(self._labels[where])

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
        number, known, left_out = {name: i for i, name in enumerate(self.names)}, -1, self._decoder.left_out
        while len(left_out.reasons) != known:  # else a broken one was among them
            known = len(left_out.reasons)
            index = torch.tensor([number[name] for name in names if name in number and name not in left_out])
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

    def _in_memory(self) -> InMemory:
        # Where these are a part of a set, the ends of all its files were looked at before.
        decoded = self._decoder.all(self._names, with_digests=self._chosen is None)
        self._files.close()
        if decoded.digests is not None:
            self._seen = fingerprint.together([decoded.digests])
        self._kept, labels = decoded.is_whole, self._labels
        if len(decoded.images) < len(self._names):
            self.notes.append(self._decoder.words(len(self._names) - len(decoded.images), len(self._names)))
            labels = None if labels is None else labels[self._kept]
        return InMemory(decoded.images, labels, self.class_names, self.hflip)
