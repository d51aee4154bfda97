"""The text that a PNG of this project carries, in a chunk of its own; of a stranger's file nothing is unpacked.

The chunk is a tEXt (PNG, third edition, 11.3.3): a keyword, a zero byte, Latin-1. exiftool, `magick identify -verbose`
and Pillow's `Image.text` show it.
"""

import struct
import zlib
from pathlib import Path

from ..core.errors import InputError
from ..core.files import may_pass, read_small, regular, unreadable

KEYWORD = "cm-train"
MOST_CHARACTERS = 1 << 15

_MOST_BYTES = 1 << 26  # of a picture; what is larger is none of ours
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">I4s")  # of a chunk: how many bytes, and what they are; their CRC follows them


def read_noted(path: Path) -> tuple[bytes, str]:
    """A PNG's bytes, and the note in it.

    Raises:
        InputError: it can't be read, is no PNG or half of one, or there is no note in it, or a damaged one.
    """
    try:
        content = read_small(path, _MOST_BYTES, regular)
    except OSError as error:
        if may_pass(error):
            raise unreadable(path, error) from None
        raise InputError(f"{path} is no file to read: {error.strerror or error}", fix="from=PICTURE.png") from None
    except ValueError as error:  # it is too large, or no name at all
        raise InputError(f"{path} is no picture of cm-sample: {error}", fix="from=PICTURE.png") from None
    if not content.startswith(_SIGNATURE):
        raise InputError(f"{path} is no PNG", fix="from=PICTURE.png, as cm-sample writes them")
    note = _note(content, path)
    if note is None:
        fix = "a picture from images/ as it was written: other programs leave the note out when they save"
        raise InputError(f"{path} does not say what made it: it has no note of cm-sample", fix=fix)
    return content, note


def _note(content: bytes, path: Path) -> str | None:
    at, prefix, found = len(_SIGNATURE), KEYWORD.encode() + b"\0", None
    while at + _HEADER.size <= len(content):
        length, kind = _HEADER.unpack_from(content, at)
        start, end = at + _HEADER.size, at + _HEADER.size + length
        if end + 4 > len(content):
            break
        if kind == b"IEND":
            return found
        if kind == b"tEXt" and content.startswith(prefix, start, end):
            data = content[start:end]
            if len(data) > len(prefix) + MOST_CHARACTERS or zlib.crc32(kind + data) != int.from_bytes(
                content[end : end + 4]
            ):
                raise InputError(f"the note in {path} is damaged")
            found = data[len(prefix) :].decode("latin-1")
        at = end + 4
    raise InputError(f"{path} is cut off: it ends in the middle of a PNG", fix="a whole copy of it")
