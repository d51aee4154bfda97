"""The note in a PNG: what other programs see of it, and what strangers may put in its place."""

import struct
import zlib

import pytest
import torch
from PIL import Image, PngImagePlugin

from cm_train.core.errors import InputError
from cm_train.data.pixels import read_png, save_png
from cm_train.data.png_notes import MOST_CHARACTERS, read_noted
from conftest import chunk, with_chunk

PICTURE = torch.arange(3 * 6 * 5, dtype=torch.uint8).view(3, 6, 5)


@pytest.fixture
def plain(tmp_path):
    save_png(PICTURE, tmp_path / "plain.png")
    return (tmp_path / "plain.png").read_bytes()


def test_a_note_is_read_back_here_and_by_pillow_and_moves_no_pixel(tmp_path, plain):
    path, text = tmp_path / "x.png", '{"seed": 7}'
    save_png(PICTURE, path, text)
    assert read_noted(path) == (path.read_bytes(), text)
    assert Image.open(path).text == {"cm-train": text}
    assert torch.equal(read_png(path, (3, 6, 5)), PICTURE)
    assert path.read_bytes() == with_chunk(plain, chunk(b"tEXt", b"cm-train\0" + text.encode()))
    before = path.read_bytes()
    save_png(PICTURE, path, text)
    assert path.read_bytes() == before
    save_png(PICTURE, path, "x" * MOST_CHARACTERS)
    assert len(read_noted(path)[1]) == MOST_CHARACTERS
    assert torch.equal(read_png(path, (3, 6, 5)), PICTURE)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p, "does not say what made it: it has no note of cm-sample; fix: a picture from images/"),
        (lambda p: p[:-1], "is cut off"),
        (lambda p: p[:40], "is cut off"),
        (lambda p: p[:8], "is cut off"),
        (lambda p: p[:7], "is no PNG"),
        (lambda p: b"", "is no PNG"),
        (lambda p: b"GIF89a" + p, "is no PNG"),
        (lambda p: with_chunk(p, struct.pack(">I", 2**31 - 1) + b"tEXtcm-train\0"), "is cut off"),
        (lambda p: with_chunk(p, chunk(b"tEXt", b"cm-train\0{}")[:-1] + b"!"), "the note in .* is damaged"),
        (lambda p: with_chunk(p, chunk(b"tEXt", b"cm-train\0" + b"x" * 40_000)), "the note in .* is damaged"),
        (lambda p: with_chunk(p, chunk(b"tEXt", b"cm-trains\0{}")), "does not say"),
        (lambda p: with_chunk(p, chunk(b"zTXt", b"cm-train\0\0" + zlib.compress(bytes(1 << 28)))), "does not say"),
        (lambda p: with_chunk(p, chunk(b"iTXt", b"cm-train\0\1\0\0\0" + zlib.compress(bytes(1 << 28)))), "does not"),
    ],
)
def test_what_has_no_good_note_is_refused_in_one_line(make, said, tmp_path, plain):
    path = tmp_path / "x.png"
    path.write_bytes(make(plain))
    with pytest.raises(InputError, match=said) as error:
        read_noted(path)
    assert str(path) in str(error.value)


def test_a_note_of_another_form_is_none_of_ours(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "cm-train\0{}")
    Image.new("L", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(InputError, match="no note"):
        read_noted(tmp_path / "x.png")
    for name in ("missing.png", "."):
        with pytest.raises(InputError, match="is no file to read"):
            read_noted(tmp_path / name)
    (tmp_path / "huge.png").touch()
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(InputError, match="is no picture of cm-sample: larger than"):
        read_noted(tmp_path / "huge.png")
