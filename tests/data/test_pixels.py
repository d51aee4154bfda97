import numpy as np
import torch
from PIL import Image

from cm_train.data.pixels import grid, read_png, save_png, to_uint8, to_unit_range


def test_to_uint8_inverts_to_unit_range_for_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)


def test_to_uint8_rounds_to_the_nearest_level_and_clamps():
    """One rule everywhere: round((x + 1) * 127.5), not truncation, which would darken by half a level."""
    x = torch.linspace(-1, 1, 10_001, dtype=torch.float64)
    error = (x + 1) * 127.5 - to_uint8(x).double()
    assert error.abs().max() <= 0.5 + 1e-9
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_grid_shows_every_image_whole_with_gaps():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 8, 8) + 200
    picture = grid(images, columns=3, min_side=1)
    assert picture.shape == (1, 2 * 9 + 1, 3 * 9 + 1)
    for i in range(5):
        y, x = 1 + i // 3 * 9, 1 + i % 3 * 9
        assert (picture[0, y : y + 8, x : x + 8] == 200 + i).all()
        assert (picture[0, y - 1, x : x + 8] < 200).all()


def test_grid_enlarges_small_images_by_a_whole_factor():
    picture = grid(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), min_side=190)
    assert picture.shape == (3, 190, 190)


def test_save_png_keeps_grey_and_colour(tmp_path):
    for channels, mode in ((1, "L"), (3, "RGB")):
        picture = torch.randint(0, 256, (channels, 6, 5), dtype=torch.uint8)
        save_png(picture, tmp_path / "new" / "x.png")
        read = Image.open(tmp_path / "new" / "x.png")
        assert read.mode == mode
        array = np.asarray(read)
        assert (array.reshape(6, 5, channels) == picture.permute(1, 2, 0).numpy()).all()


def test_read_png_gives_what_save_png_wrote_and_nothing_of_any_other_file(tmp_path):
    for channels in (1, 3):
        picture = torch.randint(0, 256, (channels, 6, 5), dtype=torch.uint8)
        save_png(picture, tmp_path / "x.png")
        assert torch.equal(read_png(tmp_path / "x.png", (channels, 6, 5)), picture)
        assert read_png(tmp_path / "x.png", (channels, 5, 6)) is None
        assert read_png(tmp_path / "x.png", (4 - channels, 6, 5)) is None
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "link.png").symlink_to("x.png")
    for name, content in (
        ("empty", b""),
        ("half", whole[:-30]),
        ("zeros", bytes(100)),
        ("large", whole + bytes(10**6)),
    ):
        (tmp_path / f"{name}.png").write_bytes(content)
    for name in ("link", "empty", "half", "zeros", "large", "missing"):
        assert read_png(tmp_path / f"{name}.png", (3, 6, 5)) is None, name
