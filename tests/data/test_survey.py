"""A look at what image files say of themselves."""

import io
import zipfile

import pytest
from PIL import Image

from cm_train.core import registry
from cm_train.core.run_layout import called_after
from cm_train.data import description
from cm_train.data.folder_files import FolderFiles
from cm_train.data.survey import MOST_LOOKED_AT, survey


def write(folder, *sizes, mode="RGB", kind="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        number = len(list(folder.iterdir()))
        Image.new(mode, size, number % 250).save(folder / f"{number:05}.{kind}")


def look(folder):
    files = FolderFiles(folder)
    return survey(files, sorted(files.sizes))


@pytest.mark.parametrize(
    ("sides", "size"),
    [([10], 16), ([16], 16), ([31], 16), ([32], 32), ([63], 32), ([64], 64), ([4000], 64), ([20, 70, 80], 64)],
)
def test_image_size_is_the_largest_not_above_the_median_short_side(sides, size, tmp_path):
    write(tmp_path / "a", *((side, side + 9) for side in sides))
    assert look(tmp_path / "a").image_size(64) == size
    assert look(tmp_path / "a").image_size(32) == min(size, 32)


def test_what_can_not_be_read_is_counted_and_ends_nothing(tmp_path):
    write(tmp_path, (40, 50), (60, 40))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "empty.png").write_bytes(b"")
    seen = look(tmp_path)
    assert (seen.num, sorted(seen.sides), seen.unreadable) == (4, [(40, 50), (60, 40)], ["broken.jpg", "empty.png"])
    assert survey(FolderFiles(tmp_path), ["empty.png"]).image_size(32) == 32


def test_a_head_that_lies_after_much_else_is_found(tmp_path):
    image = Image.effect_noise((700, 500), 90)
    image.save(tmp_path / "late.tif")  # whose table comes after the pixels
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    image.save(tmp_path / "long.jpg", exif=exif)
    assert sorted(look(tmp_path).sides) == [(700, 500), (700, 500)]


def test_of_many_files_some_are_looked_at_evenly(tmp_path, monkeypatch):
    write(tmp_path, *((20 + i, 20 + i) for i in range(20)))
    monkeypatch.setattr("cm_train.data.survey.MOST_LOOKED_AT", 5)
    assert sorted(w for w, _ in look(tmp_path).sides) == [20, 24, 28, 32, 36]
    assert MOST_LOOKED_AT > 1000


def test_facts_are_those_of_the_set_that_is_built(tmp_path):
    write(tmp_path / "pets", (40, 50), (60, 40), (33, 90))
    config = registry.settings(
        "dataset", {"name": "image_folder", "root": str(tmp_path / "pets"), "image_size": "auto"}
    )
    facts = config.facts(64)
    assert (facts.image_size, facts.channels, facts.count) == (32, 3, 3)
    assert "median short side is 40" in facts.remarks[0]
    dataset = registry.build(config.model_copy(update={"image_size": facts.image_size}))
    dataset.load()
    assert (dataset.image_size, dataset.channels, len(dataset)) == (32, 3, 3)


def test_pictures_that_are_enlarged_are_said(tmp_path):
    write(tmp_path, (40, 50), (60, 40), (120, 90))
    config = registry.settings("dataset", {"name": "image_folder", "root": str(tmp_path), "image_size": 64})
    assert any("67% of the pictures are smaller than 64 pixels" in remark for remark in config.facts(64).remarks)


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "cifar10"])
def test_known_facts_need_no_file(name, tmp_path):
    facts = registry.settings("dataset", {"name": name}).facts(64)
    assert facts.count in (1797, 50_000, 60_000)
    if name == "digits":
        dataset = registry.make("dataset", {"name": name})
        assert (dataset.image_size, dataset.channels, len(dataset)) == (facts.image_size, facts.channels, facts.count)


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("photos", "photos"),
        ("~/My Photos/", "My-Photos"),
        ("a/photos.zip", "photos"),
        ("a/photos.ZIP", "photos"),
        ("photos.zip/train", "photos-train"),
        ("pets/train", "pets-train"),
        ("pets/images/", "pets-images"),
        ("x=1", "x-1"),
        ("/", "pictures"),
        ("...", "pictures"),
    ],
)
def test_runs_are_called_after_what_a_person_would_say(root, name):
    assert called_after(root) == name


def test_description_counts_what_a_person_should_see(tmp_path):
    write(tmp_path / "cats", (40, 40), (40, 60))
    write(tmp_path / "dogs", (20, 20))
    buffer = io.BytesIO()
    Image.new("LA", (40, 40), (3, 9)).save(buffer, "PNG")
    (tmp_path / "dogs" / "again.png").write_bytes(buffer.getvalue())
    (tmp_path / "dogs" / "twice.png").write_bytes(buffer.getvalue())
    values = {"name": "image_folder", "root": str(tmp_path), "image_size": 32, "conditional": True}
    dataset = registry.make("dataset", values)
    dataset.load()
    found = description.describe(dataset)
    assert found["classes"] == {"cats": 2, "dogs": 3}
    assert (found["cropped"], found["enlarged"], found["modes"]) == (1, 1, {"RGB": 3, "LA": 2})
    assert found["same_as_another"] == 2, "a black square of two sizes, and the doubled file"
    lines = "\n".join(description.lines(found))
    for words in ("5 images, 32x32 colour", "cats (2), dogs (3)", "40x40 (3)", "cropped to a square: 1; enlarged: 1"):
        assert words in lines


def test_a_zip_is_looked_at_in_place(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        buffer = io.BytesIO()
        Image.new("RGB", (48, 80)).save(buffer, "JPEG")
        archive.writestr("pets/one.jpg", buffer.getvalue())
    root = str(tmp_path / "a.zip")
    config = registry.settings("dataset", {"name": "image_folder", "root": root, "image_size": "auto"})
    assert config.facts(64).image_size == 32
