"""The images of a zip, read in place."""

import os
import struct
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..core.errors import InputError
from ..core.files import may_pass
from ..core.signals import heed
from .image_files import LABELS, ImageFiles, Places, check_size, is_hidden, stamp

_FLAG_UTF_8, _UNIX = 0x800, 3  # of a member
_HEADER_BYTES, _HEADER_LENGTHS = 30, 26  # of a header before a member, and where in it the lengths of the rest are


class ZipFiles(ImageFiles):
    """Members are read one at a time into memory; nothing is ever unpacked to disk.

    Names count from the folder that alone is at the top of the archive, where there is one: whether people pack a
    folder or what is in it, they mean the same.

    Args:
        below: the folder inside the archive from which on names count instead, by its whole path or from that one.

    Raises:
        InputError: it is no zip, or a damaged one.
    """

    def __init__(self, root: Path, below: tuple[str, ...] = ()):
        super().__init__()
        self._num_below = len(below)
        self._lock = threading.Lock()  # a ZipFile counts its open members without one
        try:
            found = os.stat(root)
            self._zip = zipfile.ZipFile(root)
            members = list(self._scan(list(below)))
            self._members = dict(members)
            self.doubled = len(members) - len(self._members)
            if sum(info.compress_size for info in self._members.values()) > found.st_size:
                raise ValueError("its members overlap")  # so that a small file inflates for ever
        except Exception as error:  # a file that only looks like a zip raises nearly anything
            fix = f"dataset.root={root.parent} for the folder that it is in"
            raise InputError("not a zip of images", f"{root}: {error}", "a folder, or a .zip", fix) from error
        images = [name for name in self._members if name not in self.label_files]
        self.sizes = {name: self._members[name].file_size for name in images}
        self.stamps = dict.fromkeys(images, stamp(found))

    def _scan(self, below: list[str]) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        members = [(_parts(_name(info)), info) for info in self._zip.infolist()]
        inside = below
        if not below or not any(parts[: len(below)] == below for parts, _ in members):
            inside = _only_folder(members) + below
        for parts, info in members:
            heed()
            inner = parts[len(inside) :]
            is_inside = bool(inner) and parts[: len(inside)] == inside and not info.is_dir()
            if is_inside and (self._is_image(inner) or inner[-1].lower() == LABELS):
                yield "/".join(inner), info

    def read(self, name: str) -> bytes:
        info = self._members[name]
        check_size(info.file_size)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # zipfile can bound what these two become in memory; the others can fill it.
            raise ValueError("compressed in another way than zip's usual one")
        with self._lock:
            member = self._zip.open(info)
        try:
            return member.read(info.file_size)  # asked for no size, it inflates up to a GiB, whatever was declared
        finally:
            with self._lock:
                member.close()

    def sample(self, name: str, places: Places) -> bytes:
        info, archive = self._members[name], self._zip.fp
        assert archive is not None, "closed"
        try:
            if info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size:
                return _pieces(archive.fileno(), info, places(info.file_size))
            content = self.read(name)
        except Exception as error:  # a damaged archive makes zipfile raise nearly anything
            if may_pass(error):
                raise
            return b""
        return b"".join(content[place] for place in places(len(content)))

    def former(self, name: str) -> tuple[str, int, int]:
        info = self._members[name]
        return "/".join(_parts(info.filename)[self._num_below :]), info.file_size, info.CRC

    def close(self) -> None:
        self._zip.close()


def _pieces(archive: int, info: zipfile.ZipInfo, places: list[slice]) -> bytes:
    """Bytes of a member that is not compressed, without what lies between them."""
    lengths = struct.unpack("<HH", os.pread(archive, 4, info.header_offset + _HEADER_LENGTHS))
    start = info.header_offset + _HEADER_BYTES + sum(lengths)
    return b"".join(os.pread(archive, place.stop - place.start, start + place.start) for place in places)


def _name(info: zipfile.ZipInfo) -> str:
    """As unzip would call the file: a Unix's zip keeps a name's bytes, and seldom says that they are UTF-8."""
    if info.create_system == _UNIX and not info.flag_bits & _FLAG_UTF_8:
        with suppress(UnicodeError):  # they aren't, or a newer Python knows the name from elsewhere
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


def _parts(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _only_folder(members: list[tuple[list[str], zipfile.ZipInfo]]) -> list[str]:
    """The folder that all of an archive is in; none where something else lies beside it."""
    seen = [(parts, info) for parts, info in members if parts and not is_hidden(parts[0])]
    has_file = any(len(parts) == 1 and not info.is_dir() for parts, info in seen)
    tops = {parts[0] for parts, _ in seen}
    return list(tops) if len(tops) == 1 and not has_file else []
