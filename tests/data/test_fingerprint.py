"""One set of image files has one fingerprint, however it lies and is held; those of earlier versions count."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.data import fingerprint
from cm_train.data.datasets.in_memory import InMemory

HELD, LAZY = {"memory_gb": 4.0}, {"memory_gb": 0.0}
SIZES = {"a/1.bmp": 20, "a/2.bmp": 40, "a/3.bmp": 60, "Öl/10.bmp": 12, "Öl/2.bmp": 13}  # 1.3, 4.9, 10.9 KB and less


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def noise(side):
    return np.random.default_rng(side).integers(256, size=(side, side, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures that are below 4 KiB, below 8 and above, of two classes, and a text that is none."""
    root = tmp_path / "photos"
    for name, side in SIZES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(side)).save(root / name)
    (root / "a" / "notes.txt").write_text("no picture")
    return root


def build(root, **values):
    dataset = registry.make("dataset", {"name": "image_folder", "root": str(root), "image_size": 8, **values})
    dataset.load()
    return dataset


def name_of(root, **values):
    """The fingerprint of a set, which is the same in memory and on the fly."""
    (name,) = {build(root, **values, **where).fingerprint() for where in (HELD, LAZY)}
    assert name.startswith("images:") and len(name) == 71
    return name


def zipped(path, folder, top="", compression=zipfile.ZIP_DEFLATED, beside=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, f"{top}{file.relative_to(folder)}")
        for name in beside:
            archive.writestr(name, b"")
    return path


def pack_unflagged(path, folder):
    """As zip and the Finder pack it: names in UTF-8, and nothing says so."""
    zipped(path, folder, "photos/")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            assert info.create_system == 3
            local, central = info.header_offset, content.index(info.filename.encode(), archive.start_dir) - 46
            for place in (local + 6, central + 8):
                content = content[:place] + b"\0\0" + content[place + 2 :]
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert any("├û" in name for name in archive.namelist())
    return path


# ------------------------------------------------------------------------------------------------------------ the same


@pytest.mark.parametrize("conditional", [False, True])
def test_a_set_is_the_same_wherever_it_lies(photos, tmp_path, monkeypatch, conditional):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(photos, "moved")
    Path("linked").symlink_to(photos)
    zipped(tmp_path / "plain.zip", photos)
    zipped(tmp_path / "stored.zip", photos, compression=zipfile.ZIP_STORED)
    zipped(tmp_path / "top.zip", photos, "photos/")
    zipped(tmp_path / "stored top.zip", photos, "photos/", zipfile.ZIP_STORED)
    zipped(tmp_path / "mac.zip", photos, "photos/", beside=["__MACOSX/photos/._1.bmp", ".DS_Store", "./"])
    zipped(tmp_path / "deep.zip", photos, "x/photos/", beside=["x/README.md"])
    pack_unflagged(tmp_path / "unflagged.zip", photos)
    roots = [photos, "photos", "./photos/", "photos//", "~/photos", "moved/../photos", "moved", "linked", "plain.zip"]
    roots += ["./stored.zip", "top.zip", "top.zip/photos", "stored top.zip", "mac.zip", "unflagged.zip"]
    roots += ["deep.zip/x/photos", "deep.zip/photos"]
    (whole,) = {name_of(root, conditional=conditional) for root in roots}
    images = build("photos", conditional=conditional).gather(torch.arange(5))
    for root in roots:
        dataset = build(root, conditional=conditional)
        assert dataset.class_names == (["a", "Öl"] if conditional else []), root
        assert dataset.gather(torch.arange(5))[0].equal(images[0]), root
    other_use = {"hflip": False, "skip_broken": True, "max_megapixels": 1.0}
    assert name_of("photos", conditional=conditional, **other_use) == whole


def test_a_set_is_the_same_whatever_is_above_it(photos, tmp_path):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    shutil.copytree(photos, tmp_path / "outer" / "inner" / "photos")
    whole = name_of(photos, conditional=True)
    assert name_of(tmp_path / "outer", conditional=True) == whole
    assert name_of(zipped(tmp_path / "outer.zip", tmp_path / "outer", "top/"), conditional=True) == whole


def test_the_only_folder_at_the_top_of_a_zip_is_no_level(photos, tmp_path):
    listed = [[name, i % 2] for i, name in enumerate(sorted(SIZES))]
    root, top = photos, zipped(tmp_path / "top.zip", photos, "photos/")
    assert build(top, conditional=True, class_level=1).class_names == ["a", "Öl"]
    with pytest.raises(InputError, match="folders of classes at level 2"):
        build(top, conditional=True, class_level=2)
    (root / "dataset.json").write_text(json.dumps({"labels": listed}))
    by_list = zipped(tmp_path / "list.zip", root, "photos/")
    assert name_of(by_list, conditional=True) == name_of(root, conditional=True) != name_of(top, conditional=True)
    assert name_of(by_list, conditional=True, class_level=1) == name_of(top, conditional=True)
    beside = zipped(tmp_path / "beside.zip", photos, "photos/", beside=["README.md"])
    assert build(beside, conditional=True, class_level=2).class_names == ["a", "Öl"], "as in the folder of all this"


def test_what_is_left_out_is_part_of_a_set_in_memory_and_on_the_fly(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("cm_train.data.image_files._MAX_BYTES", 12_000)
    whole = name_of(photos)
    (photos / "b").mkdir()
    (photos / "b" / "text.png").write_bytes(b"no picture")
    (photos / "b" / "empty.png").write_bytes(b"")
    (photos / "b" / "large.png").write_bytes(bytes(12_001))
    broken = name_of(photos, skip_broken=True)
    assert broken != whole
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert name_of(zipped(tmp_path / "x.zip", photos, compression=compression), skip_broken=True) == broken
    (photos / "b" / "nowhere.png").symlink_to("nothing")
    os.mkfifo(photos / "b" / "pipe.png")
    assert name_of(photos, skip_broken=True) != broken
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as archive:
        archive.writestr("whole.bmp", (photos / "a" / "1.bmp").read_bytes())
        archive.writestr("stored.png", b"#" * 5000)
        archive.writestr("deflated.png", bytes(range(256)) * 20, zipfile.ZIP_DEFLATED)
        places = [info.header_offset + 50 for info in archive.infolist()[1:]]
    content = bytearray((tmp_path / "damaged.zip").read_bytes())
    for place in places:
        content[place] ^= 1
    (tmp_path / "damaged.zip").write_bytes(content)
    assert name_of(tmp_path / "damaged.zip", skip_broken=True)


# ----------------------------------------------------------------------------------------------------------- different


def flip(place):
    def change(root):
        content = bytearray((root / "a" / "3.bmp").read_bytes())
        content[place] ^= 1
        (root / "a" / "3.bmp").write_bytes(content)

    return change


def swap(root):
    (root / "a" / "1.bmp").rename(root / "x")
    (root / "a" / "2.bmp").rename(root / "a" / "1.bmp")
    (root / "x").rename(root / "a" / "2.bmp")


CHANGES = {
    "a byte at the beginning": flip(4000),
    "a byte at the end": flip(-4000),
    "one byte more": lambda root: (root / "a" / "1.bmp").write_bytes((root / "a" / "1.bmp").read_bytes() + b"\0"),
    "one file more": lambda root: shutil.copy(root / "a" / "1.bmp", root / "a" / "4.bmp"),
    "one file fewer": lambda root: (root / "a" / "1.bmp").unlink(),
    "another name": lambda root: (root / "a" / "1.bmp").rename(root / "a" / "0.bmp"),
    "another class": lambda root: (root / "a" / "1.bmp").rename(root / "Öl" / "1.bmp"),
    "another folder": lambda root: (root / "a").rename(root / "b"),
    "two exchanged": swap,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_set_is_another_where_its_files_are(photos, tmp_path, change):
    whole = name_of(photos)
    CHANGES[change](photos)
    changed = {name_of(photos)} | {
        name_of(zipped(tmp_path / f"{n}.zip", photos, "x/", compression)) for n, compression in enumerate((0, 8))
    }
    assert len(changed) == 1 and whole not in changed


@pytest.mark.parametrize(
    "values",
    [{"image_size": 9}, {"channels": 1}, {"background": 0}, {"conditional": True}],
    ids=lambda v: next(iter(v)),
)
def test_a_set_is_another_where_it_is_decoded_or_labelled_otherwise(photos, values):
    assert name_of(photos, **values) != name_of(photos)


def test_labels_of_a_list_make_another_set(photos):
    found = set()
    for shift in (0, 1):
        rows = [[name, (i + shift) % 2] for i, name in enumerate(SIZES)]
        (photos / "dataset.json").write_text(json.dumps({"labels": rows}))
        found |= {name_of(photos, conditional=True), name_of(photos)}
    assert len(found) == 3, "without labels it is one"


# ---------------------------------------------------------------------------------------------------------- looking at


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_are_looked_at_once_and_again_where_they_were_written_to(photos, tmp_path, monkeypatch, kind):
    def root():
        return photos if kind == "folder" else zipped(tmp_path / "x.zip", photos)

    place = root()
    whole = build(place, **LAZY).fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "look_at", lambda *_: pytest.fail("looked again"))
        assert build(place, **LAZY).fingerprint() == whole
        assert build(place, **LAZY, image_size=9).fingerprint() != whole
    flip(4000)(photos)
    assert build(root(), **LAZY).fingerprint() != whole


def test_a_set_in_memory_is_not_read_again_for_its_fingerprint(photos, tmp_path, monkeypatch):
    for root in (photos, zipped(tmp_path / "x.zip", photos)):
        dataset = build(root)
        monkeypatch.setattr(fingerprint, "look", lambda *_: pytest.fail("read again"))
        assert dataset.fingerprint()


def test_a_cache_that_is_damaged_or_can_not_be_written_is_no_matter(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = build(photos, **LAZY).fingerprint()
    (file,) = (tmp_path / "cache" / "cm-train" / "fingerprints").iterdir()
    for content in (b"", b"0" * 63, b"x" * 64, b"0" * 65):
        file.write_bytes(content)
        assert build(photos, **LAZY).fingerprint() == whole
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build(photos, **LAZY).fingerprint() == whole


# ----------------------------------------------------------------------------------------------------- earlier versions


def of_pixels(dataset, order=None):
    images, labels = dataset.gather(torch.arange(len(dataset)) if order is None else torch.tensor(order))
    return InMemory(images, labels, dataset.class_names).fingerprint()


def of_files(root, top, conditional):
    """As the version before had it for what it decoded on the fly, and as 0.1.0 had it."""
    names = sorted(top + name for name in SIZES)
    listed = hashlib.sha256(repr((8, 3, conditional, 255)).encode())
    if root.suffix == ".zip":
        with zipfile.ZipFile(root) as archive:
            infos = {name: archive.getinfo(name) for name in names}
        listed.update(b"".join(repr((n, f"{infos[n].file_size} {infos[n].CRC}")).encode() for n in names))
        return f"files:{listed.hexdigest()}", listed.hexdigest()
    contents = {name: (root / name).read_bytes() for name in names}
    listed.update(b"".join(repr((name, str(len(contents[name])))).encode() for name in names))
    first = listed.hexdigest()
    sums = hashlib.sha256()
    for content in contents.values():
        size = len(content)
        starts = sorted({0, max(0, size // 2 - 8192), max(0, size - 16384)})
        sums.update(hashlib.sha256(b"".join(content[start : start + 16384] for start in starts)).digest())
    listed.update(hashlib.sha256(sums.digest()).digest())
    return f"files:{listed.hexdigest()}", first


@pytest.mark.parametrize("kind", ["folder", "zip", "zip with a top folder"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("where", [HELD, LAZY], ids=["held", "lazy"])
def test_earlier_fingerprints_of_the_same_data_count(photos, tmp_path, kind, conditional, where):
    Image.fromarray(noise(130)).save(photos / "a" / "3.bmp")  # of which one did not look at all bytes
    top = "photos/" if "top" in kind else ""
    root = photos if kind == "folder" else zipped(tmp_path / "x.zip", photos, top)
    names = [of_pixels(build(root, conditional=conditional)), *of_files(root, top, conditional)]
    now = build(root, conditional=conditional, **where).fingerprint()
    for name in names:
        dataset = build(root, conditional=conditional, **where)
        assert dataset.is_known_as(name) and dataset.was_known_as(name) and dataset.fingerprint() == now
    for other in ("0" * 64, f"files:{'0' * 64}", f"images:{'0' * 64}", f"later:{names[0]}", ""):
        assert not dataset.is_known_as(other) and not dataset.was_known_as(other)
    Image.fromarray(255 - noise(130)).save(photos / "a" / "3.bmp")
    changed = photos if kind == "folder" else zipped(tmp_path / "x.zip", photos, top)
    dataset = build(changed, conditional=conditional, **where)
    only_sizes = kind == "folder"  # were what 0.1.0 knew, of a zip checksums too
    assert [dataset.is_known_as(name) for name in [now, *names]] == [False, False, False, only_sizes]


@pytest.mark.parametrize("where", [HELD, LAZY], ids=["held", "lazy"])
def test_earlier_fingerprints_count_with_files_that_are_left_out(photos, where):
    (photos / "a" / "2.bmp").write_bytes(b"no picture")
    name = of_pixels(build(photos, skip_broken=True))
    assert build(photos, skip_broken=True, **where).is_known_as(name)
    (photos / "a" / "1.bmp").write_bytes(b"no picture either")
    assert not build(photos, skip_broken=True, **where).is_known_as(name)


@pytest.mark.parametrize("where", [HELD, LAZY], ids=["held", "lazy"])
def test_earlier_fingerprints_of_a_zip_whose_names_were_misread_count(photos, tmp_path, where):
    for name in ("Éa", "Öl", "âb", "ñc"):  # one byte is their first; misread, they come in another order
        (photos / name).mkdir(exist_ok=True)
        shutil.copy(photos / "a" / "1.bmp", photos / name / "1.bmp")
    root = pack_unflagged(tmp_path / "x.zip", photos)
    dataset = build(root, **where)
    with zipfile.ZipFile(root) as archive:
        misread = sorted(name for name in archive.namelist() if name.endswith(".bmp"))
    right = [name.encode("cp437").decode().removeprefix("photos/") for name in misread]
    assert right != sorted(right)
    assert dataset.is_known_as(of_pixels(dataset, [sorted(right).index(name) for name in right]))


@pytest.mark.parametrize("where", [HELD, LAZY], ids=["held", "lazy"])
def test_a_run_that_has_learnt_classes_in_another_order_keeps_it_for_ever(tmp_path, where):
    """Version 0.1.0 had 10 before 2; what a run of it is known by now must say so too."""
    for i in (1, 2, 10):
        (tmp_path / "set" / str(i)).mkdir(parents=True)
        Image.fromarray(noise(8 + i)).save(tmp_path / "set" / str(i) / "1.bmp")

    def new():
        return build(tmp_path / "set", conditional=True, **where)

    images = new().gather(torch.arange(3))[0]
    recorded = InMemory(images, torch.tensor([0, 1, 2]), ["1", "10", "2"]).fingerprint()
    assert new().class_names == ["1", "2", "10"]
    for _ in range(3):  # each time it is resumed
        dataset = new()
        assert not dataset.is_known_as(recorded), "it is not as that run has learnt it"
        assert dataset.class_names == ["1", "2", "10"], "asking changes nothing"
        assert dataset.was_known_as(recorded)
        assert dataset.class_names == ["1", "10", "2"]
        assert dataset.gather(torch.arange(3))[1].tolist() == [0, 1, 2]
        recorded = dataset.fingerprint()
        assert recorded != new().fingerprint() and dataset.is_known_as(recorded)
