"""Words under the images of a grid."""

import pytest
import torch
from PIL import ImageFont

from cm_train.core.errors import InputError
from cm_train.data.captions import written
from cm_train.data.pixels import grid
from cm_train.data.show import show


def white(count, side=8, channels=1):
    return torch.full((count, channels, side, side), 255, dtype=torch.uint8)


@pytest.mark.parametrize(("side", "count"), [(8, 64), (8, 100), (28, 64), (32, 100), (64, 64), (256, 4)])
def test_images_stay_whole_above_their_captions(side, count):
    images = torch.randint(100, 256, (count, 3, side, side), dtype=torch.uint8)
    picture = grid(images, captions=[f"c{i}" for i in range(count)])
    columns, gap = round(count**0.5), max(1, side // 16)
    factor = picture.shape[2] // (columns * (side + gap) + gap)
    assert side * factor >= 64, "room for a word"
    height = (picture.shape[1] - gap * factor) // columns  # of a row
    for i in range(count):
        y, x = gap * factor + i // columns * height, factor * (gap + i % columns * (side + gap))
        cell = picture[:, y : y + side * factor, x : x + side * factor]
        assert torch.equal(cell[:, ::factor, ::factor], images[i])
        strip = picture[:, y + side * factor : y + height, x : x + side * factor]
        assert strip.max() > 180 and strip.min() >= 90, "something is written on the grey"
        assert (strip[0] == strip[1]).all()


def test_no_captions_leave_the_grid_as_it_is():
    assert torch.equal(grid(white(9), captions=[]), grid(white(9)))


def test_long_captions_are_cut_within_their_strip():
    for width in (64, 100, 256):
        short, long, longer = written(["great", "great white shark" * 5, "great white shark" * 9], width, 90)
        assert torch.equal(long, longer) and not torch.equal(short, long)
        assert (long[:, :, [0, -1]] < 180).all(), "nothing runs out of it"
    assert written(["x"], 1, 90).shape[-1] == 1


def test_a_pillow_without_fonts_writes_nothing(monkeypatch):
    def no_fonts(size=None):
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", no_fonts)
    assert grid(white(4, 64), captions=["a"] * 4).shape == grid(white(4, 64)).shape


def test_show_gives_a_picture_of_any_images():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    picture = show(images)
    assert picture.mode == "RGB" and picture.tobytes() == show(images / 127.5 - 1).tobytes()
    assert callable(picture._repr_png_), "what Jupyter asks for"
    assert show(images[:, :1]).mode == "L" and show(images[0]).width >= 600
    wide = show(images, columns=6)
    assert wide.width > 5 * wide.height
    assert show(images, captions=["a"] * 6).height > picture.height
    assert show(torch.full((1, 1, 8, 8), 9.0, requires_grad=True)).getpixel((300, 300)) == 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": [1]}, "a tensor; got 'list'"),
        ({"images": white(2, channels=2)}, r"no images; got 'shape \[2, 2, 8, 8\]'"),
        ({"images": white(0)}, "no images"),
        ({"images": torch.zeros(8, 8)}, "no images"),
        ({"images": white(2).int()}, "no images; got 'torch.int32'; allowed: uint8"),
        ({"images": white(2), "captions": ["a"]}, "1 for 2 images"),
        ({"images": white(2), "columns": 0}, "columns must be positive"),
    ],
)
def test_show_refuses_what_are_no_images(arguments, message):
    with pytest.raises(InputError, match=message):
        show(**arguments)
