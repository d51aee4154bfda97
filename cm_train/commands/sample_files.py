"""Where cm-sample's images go: a folder of PNGs or one npz. Both know what is there, and never hold half an image."""

import contextlib
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import may_pass, not_through_a_link, unreadable
from ..core.progress import progress
from ..core.settings import excerpt
from ..core.signals import heed
from ..data.pixels import read_png, save_png
from ..models.denoiser import DenoiserConfig
from .picture_notes import MakeNotes, notes_of
from .sample_folder import IMAGES, PACKED, PARTS, UNPACKED, Request

_TOGETHER = 256  # images in memory at once

Shape = tuple[int, int, int]  # of an image, [C, H, W]


class ImageFiles(Protocol):
    """The images of a request by their place in it, 0, 1, ..."""

    def missing(self, num: int) -> list[int]:
        """Which of the first `num` are still to be drawn, in order."""

    def add(self, places: Sequence[int], images: Tensor) -> None:
        """Write uint8 [N, C, H, W] to where they belong: one piece, of which some may be there already."""

    def read(self, num: int) -> Tensor:
        """The first `num`, or as many as there are in one piece; uint8 [N, C, H, W]."""

    def finish(self) -> None:
        """All that were asked for are there."""

    def names(self, places: Sequence[int]) -> str:
        """What a user finds the images of `places` under, from `home`."""


def open_files(request: Request, home: Path, config: DenoiserConfig, share: int | None = None) -> ImageFiles:
    """What is there of a request in `home`.

    Args:
        config: of the denoiser that draws it.
        share: of the process that draws, where there are several; for an npz, which one alone can write, these draw
            into a folder that is then packed.

    Raises:
        OSError: there is no room.
    """
    beside = home / (".image.png.writing" if share is None else f".image-{share}.png.writing")
    shape = config.image_shape
    if request.format == "png":
        return Pngs(home / IMAGES, beside, shape, request.seed, notes_of(request, config))
    return Packed(home, shape) if share is None else Pngs(home / PARTS, beside, shape)


class Pngs(ImageFiles):
    """images/00000000.png, ...: a file an image, named by its number, of which the first has `first`.

    Args:
        beside: what an image is called until it is whole.
        notes: what each says of itself.
    """

    def __init__(self, folder: Path, beside: Path, shape: Shape, first: int = 0, notes: MakeNotes | None = None):
        self._folder, self._beside, self._shape, self._first = folder, beside, shape, first
        self._notes = notes
        self._folder.mkdir(exist_ok=True)

    def missing(self, num: int) -> list[int]:
        names, whole = set(os.listdir(self._folder)), set()
        there = [place for place in range(num) if self._path(place).name in names]
        with progress(len(there), "looking at what is there") as bar:
            for place in there:
                heed()
                if read_png(self._path(place), self._shape) is not None:
                    whole.add(place)
                bar.advance()
        return [place for place in range(num) if place not in whole]

    def add(self, places: Sequence[int], images: Tensor) -> None:
        notes = [""] * len(places) if self._notes is None else self._notes(places)
        for place, image, note in zip(places, images, notes, strict=True):
            save_whole(image, self._path(place), self._beside, note)

    def read(self, num: int, start: int = 0) -> Tensor:
        found = []
        for place in range(start, start + num):
            image = read_png(self._path(place), self._shape)
            if image is None:
                break
            found.append(image)
        return torch.stack(found) if found else torch.empty(0, *self._shape, dtype=torch.uint8)

    def finish(self) -> None:
        for left in self._beside.parent.glob(".image*.png.writing"):  # of one that was killed
            left.unlink(missing_ok=True)

    def names(self, places: Sequence[int]) -> str:
        return " to ".join(dict.fromkeys(f"{IMAGES}/{self._path(place).name}" for place in (places[0], places[-1])))

    def _path(self, place: int) -> Path:
        return self._folder / f"{self._first + place:08d}.png"


class Packed(ImageFiles):
    """samples.npz, one array uint8 [N, H, W, C]; until all are there their pixels lie in a hidden file, in order."""

    def __init__(self, home: Path, shape: Shape):
        channels, height, width = shape
        self._home, self._shape = home, shape
        self._row, self._size = (height, width, channels), math.prod(shape)
        self._packed, self._beside, self._unpacked = home / PACKED, home / f".{PACKED}.writing", home / UNPACKED

    def missing(self, num: int) -> list[int]:
        count = self._gather()
        parts = self._parts()
        return [*range(count, num)] if parts is None else [place for place in parts.missing(num) if place >= count]

    def add(self, places: Sequence[int], images: Tensor) -> None:
        count = max(self._num_packed(), self._num_unpacked())
        parts = self._parts()
        if parts is None or places[0] <= count:
            self._append(places, images)
        else:
            parts.add(places, images)

    def _append(self, places: Sequence[int], images: Tensor) -> None:
        if places[0] > self._num_unpacked():
            self._unpack()
        with open(self._unpacked, "ab", opener=not_through_a_link) as file:
            file.truncate(places[0] * self._size)  # what is torn is drawn again
            file.write(images.permute(0, 2, 3, 1).contiguous().numpy().data)

    def _parts(self) -> Pngs | None:
        """What processes have drawn, where they have."""
        folder = self._home / PARTS
        return Pngs(folder, self._home / ".image.png.writing", self._shape) if folder.is_dir() else None

    def _gather(self) -> int:
        """Append what processes have drawn, as far as it goes in one piece; returns how many there are then."""
        count, parts = max(self._num_packed(), self._num_unpacked()), self._parts()
        while parts is not None and len(some := parts.read(_TOGETHER, count)):
            self._append([*range(count, count + len(some))], some)
            count += len(some)
        return count

    def names(self, places: Sequence[int]) -> str:
        return PACKED

    def read(self, num: int) -> Tensor:
        self._gather()
        count = self._num_unpacked()
        if count > self._num_packed():
            with open(self._unpacked, "rb", opener=not_through_a_link) as file:
                pixels = file.read(min(num, count) * self._size)
        else:
            with self._member() as (count, member):
                pixels = member.read(min(num, count) * self._size)
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, *self._row).permute(0, 3, 1, 2)

    def finish(self) -> None:
        self._gather()
        count = self._num_unpacked()
        if count > self._num_packed():
            with (
                open(self._unpacked, "rb", opener=not_through_a_link) as file,
                open(self._beside, "wb", opener=not_through_a_link) as packed,
            ):
                np.savez(packed, np.memmap(file, np.uint8, "r", shape=(count, *self._row)))  # arr_0
                packed.flush()
                os.fsync(packed.fileno())
            os.replace(self._beside, self._packed)
        self._unpacked.unlink(missing_ok=True)
        shutil.rmtree(self._home / PARTS, ignore_errors=True)
        for left in self._home.glob(".image*.png.writing"):
            left.unlink(missing_ok=True)

    def _num_unpacked(self) -> int:
        try:
            with open(self._unpacked, "rb", opener=not_through_a_link) as file:
                return os.fstat(file.fileno()).st_size // self._size
        except FileNotFoundError:
            return 0

    def _num_packed(self) -> int:
        if not os.path.lexists(self._packed):
            return 0
        with self._member() as (count, _):
            return count

    @contextlib.contextmanager
    def _member(self) -> Iterator[tuple[int, IO[bytes]]]:
        """How many images are packed, and the file of their pixels."""
        try:
            with (
                open(self._packed, "rb", opener=not_through_a_link) as file,
                zipfile.ZipFile(file) as archive,
                archive.open("arr_0.npy") as member,
            ):
                info = archive.getinfo("arr_0.npy")
                np.lib.format.read_magic(member)
                shape, in_columns, dtype = np.lib.format.read_array_header_1_0(member)
                whole = info.file_size == info.compress_size == member.tell() + math.prod(shape)
                if not whole or in_columns or dtype != np.uint8 or shape[1:] != self._row:
                    raise ValueError("other images")
                yield shape[0], member
        except Exception as error:  # what is no zip makes its reader raise nearly anything
            if may_pass(error):
                raise unreadable(self._packed, error) from None
            fix = "move it away, or set out=..."
            raise InputError(f"{self._packed} is not what cm-sample wrote: {excerpt(error)}", fix=fix) from None

    def _unpack(self) -> None:
        """More images are wanted than were packed."""
        with self._member() as (count, member), open(self._unpacked, "wb", opener=not_through_a_link) as file:
            for _ in range(count):
                file.write(member.read(self._size))


def save_whole(picture: Tensor, path: Path, beside: Path, note: str = "") -> None:
    """Write one PNG as `beside`, with `note` in it, and give it its name. Raises OSError."""
    save_png(picture, beside, note)
    os.replace(beside, path)
