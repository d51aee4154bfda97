"""The images of a folder's or zip's files: one and the next that is whole, or all of them, each rank its share."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import may_pass, patiently, unreadable
from ..core.progress import progress
from ..core.signals import heed
from ..core.terminal import say
from ..core.world import World
from . import fingerprint
from .decoding import decode, prepare, reason, remarks
from .folder_settings import ImageFolderConfig
from .image_files import ImageFiles
from .left_out import LeftOut

_MAX_BAD_IN_A_ROW = 100
_CHUNK = 32  # images that a thread decodes in one go


@dataclass(frozen=True)
class Decoded:
    """All images of some files.

    Attributes:
        images: uint8 [N, C, S, S], of the files that are whole.
        is_whole: bool, one a file: which these are.
        digests: of each file what it begins and ends with, see `fingerprint.of_content`; None where nobody wants them.
    """

    images: Tensor
    is_whole: Tensor
    digests: bytes | None


class Decoder:
    """Decodes image files as a data set's settings say, in several threads.

    Attributes:
        left_out: the files that can't be decoded, so far.
    """

    def __init__(self, files: ImageFiles, config: ImageFolderConfig, world: World):
        prepare()
        assert config.image_size != "auto", "settled by `facts`"
        self.left_out = LeftOut()
        self._files, self._config, self._world = files, config, world
        self._shape = config.channels, config.image_size, config.image_size
        self._remarks: dict[str, str] = {}  # of Pillow's, and the first file of each
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def some(self, names: Sequence[str], index: Tensor) -> tuple[Tensor, Tensor]:
        """The images at `index` of these files, and where they are: in a broken one's place stands the next whole one.

        A file that is found broken late must not move the others.

        Returns:
            uint8 [B, C, S, S], and int64 [B].

        Raises:
            InputError: a hundred files in a row are broken, or one is and may not be left out.
        """
        found = list(self._pool.map(lambda i: self._near(names, i), index.tolist()))
        return torch.stack([image for _, image in found]), torch.tensor([where for where, _ in found])

    def all(self, names: Sequence[str], with_digests: bool) -> Decoded:
        """The images of all these files, the same on every rank.

        Raises:
            InputError: none is whole, or one is broken and may not be left out.
            Stopped: see `signals.heed`.
        """
        world, num = self._world, len(names)
        share = -(-num // world.size)  # images of each rank; the last one may have fewer
        mine = range(min(num, world.rank * share), min(num, (world.rank + 1) * share))
        images = torch.empty(share * world.size, *self._shape, dtype=torch.uint8)
        whole = torch.zeros(share * world.size, dtype=torch.uint8)
        # Of the ends of each file, which is read here anyway.
        seen = bytearray(share * world.size * fingerprint.DIGEST_BYTES) if with_digests else None

        def fill(chunk: range) -> None:
            for i in chunk:
                heed()
                row = slice(i * fingerprint.DIGEST_BYTES, (i + 1) * fingerprint.DIGEST_BYTES)
                digest = None if seen is None else memoryview(seen)[row]
                image = self._one(names[i], digest)
                if image is not None:
                    images[i], whole[i] = image, 1
                elif digest is not None and not any(digest):  # it could not even be read
                    digest[:] = fingerprint.look(self._files, names[i])

        def decode_mine() -> None:
            chunks = [mine[start : start + _CHUNK] for start in range(0, len(mine), _CHUNK)]
            with self._pool, progress(len(mine), "decoding images") as bar:
                for chunk, _ in zip(chunks, self._pool.map(fill, chunks), strict=True):
                    bar.advance(len(chunk))

        world.run_on_all(decode_mine)
        for shared in (images, whole):
            world.exchange_(shared)
        if seen is not None:
            world.exchange_(torch.frombuffer(seen, dtype=torch.uint8).view(-1, fingerprint.DIGEST_BYTES))
        images, is_whole = images[:num], whole[:num].bool()
        if not is_whole.all():
            if not is_whole.any():
                example = world.first_message(self.left_out.example())
                raise InputError("none of the images can be decoded", example, fix="look at dataset.root")
            images = images[is_whole]
        return Decoded(images, is_whole, None if seen is None else bytes(seen[: num * fingerprint.DIGEST_BYTES]))

    def words(self, num: int, of: int) -> str:
        """What a person should hear of `num` files of so many that can't be decoded; on every rank."""
        example = self._world.first_message(self.left_out.example())
        return f"left out {num:,} of {of:,} images that can't be decoded, as {example}{self.left_out.all_in()}"

    def _near(self, names: Sequence[str], i: int) -> tuple[int, Tensor]:
        """Image i and its index, or the next one that is whole."""
        for j in range(i, i + _MAX_BAD_IN_A_ROW):
            where = j % len(names)
            image = None if names[where] in self.left_out else self._one(names[where], says_so=True)
            if image is not None:
                return where, image
        raise InputError(f"{_MAX_BAD_IN_A_ROW} images in a row can't be decoded", self.left_out.example())

    def _one(self, name: str, digest: memoryview | None = None, says_so: bool = False) -> Tensor | None:
        """An image, uint8 [C, S, S]; None where it is broken and may be skipped.

        Args:
            digest: takes that of what the file begins and ends with, once that is read.
            says_so: whether a person hears of it that a file is left out.
        """
        c = self._config
        try:
            data = patiently(lambda: self._files.read(name))
            if digest is not None:
                digest[:] = fingerprint.of_content(data)
            with remarks() as found:
                image = decode(data, self._shape[-1], c.channels, c.background, c.max_megapixels)
            self._pass_on(name, found)
            return image
        except Exception as error:  # a bad file makes Pillow raise nearly anything
            if may_pass(error):  # which says nothing about the image
                raise unreadable(f"image {name!r} in {c.root}", error) from None
            why = reason(error)
            if not c.skip_broken:
                fix = "repair or remove it, or leave out all such files with dataset.skip_broken=true"
                raise InputError(f"image {name!r} in {c.root} can't be decoded", why, fix=fix) from error
            if self.left_out.add(name, why) and says_so:
                self.left_out.say(name)
            return None

    def _pass_on(self, name: str, found: list[str]) -> None:
        """Say what Pillow remarks on a file that it can read: each remark once, of the first file."""
        for remark in set(map(str.strip, found)) if self._world.is_main else ():
            if self._remarks.setdefault(remark, name) == name:
                say(f"note: {name!r} is read, but {remark!r}, says Pillow; of others like it no more is said")
