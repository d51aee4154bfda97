"""Folders and zips as people have them: other people's layouts, formats that are not read, files that are left out."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.core.signals import StopFlag, Stopped
from cm_train.data import decoder
from cm_train.data.decoding import decode, prepare
from cm_train.data.image_labels import are_parts, in_natural_order
from conftest import TINY


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture(level, kind="PNG"):
    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, kind)
    return file.getvalue()


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def unread(root, **values):
    default = {"name": "image_folder", "root": str(root), "image_size": 8, "channels": 1, "conditional": True}
    return registry.make("dataset", default | values)


def build(root, left_out=None, **values):
    dataset = unread(root, **values)
    dataset.load(left_out)
    return dataset


def labels(dataset):
    return dataset.gather(torch.arange(len(dataset)))[1].tolist()


def edm_style(top=""):
    """As EDM's dataset_tool writes it: shards by number, and the labels in a list."""
    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(10)]
    files = {f"{top}{name}": picture(20 * i) for i, name in enumerate(names)}
    listed = {"labels": [[name, (i * 3) % 5] for i, name in enumerate(names)]}
    return files | {f"{top}dataset.json": json.dumps(listed).encode()}


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
@pytest.mark.parametrize("kind", ["folder", "zip", "zip with a top folder"])
def test_labels_of_dataset_json_win_over_its_shards(tmp_path, kind, memory_gb):
    if kind == "folder":
        root = write(tmp_path / "edm", edm_style())
    else:
        root = tmp_path / "edm.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for name, data in edm_style("top/" if "top" in kind else "").items():
                archive.writestr(name, data)
    dataset = build(root, memory_gb=memory_gb)
    assert dataset.class_names == ["0", "1", "2", "3", "4"]
    assert labels(dataset) == [(i * 3) % 5 for i in range(10)]
    assert dataset.summary() == "10 images, 5 classes: 0, 1, 2, 3, 4"
    by_shard = build(root, memory_gb=memory_gb, class_level=1)
    assert by_shard.summary() == "10 images, 3 classes: 00000, 00001, 00002"
    assert dataset.fingerprint() != by_shard.fingerprint()


def test_one_hot_labels_of_dataset_json_are_classes(tmp_path):
    rows = [["a.png", [0.0, 1.0, 0.0]], ["b.png", [0.0, 0.0, 1.0]]]
    files = {"a.png": picture(0), "b.png": picture(9), "dataset.json": json.dumps({"labels": rows}).encode()}
    dataset = build(write(tmp_path, files))
    assert dataset.num_classes == 3 and labels(dataset) == [1, 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"labels": null}', "has no labels"),
        (b'{"labels": [["a/1.png", 1]]}', "has no label for some images; got .*1 of 2, e.g. .*b/2.png"),
        (b'{"labels": [["a/1.png", 1], ["b/2.png", 0.5]]}', "the label of 'b/2.png' is no class"),
        (b'{"labels": [["a/1.png", 1], ["b/2.png", 1e400]]}', "is no class"),
        (b'{"labels": [["a/1.png", 1], ["b/2.png", 1000000000]]}', "is no class"),
        (b'{"labels": [["a/1.png", 0], ["b/2.png", 0]]}', "in one class"),
        (b'{"labels": [["a/1.png", [0, 1]], ["b/2.png", [0, 1]]]}', "in one class"),
        (b"[1, 2]", "not pairs of a file and a label"),
        (b"[]", "has no labels"),
        (b'{"labels": 3}', "not pairs of a file and a label"),
        (b'{"labels": ["a", "b"]}', "not pairs of a file and a label"),
        (b'{"labels": ', "can't be read"),
        (b"[" * 100_000, "can't be read"),
        (b"\xff", "can't be read"),
    ],
)
def test_dataset_json_that_is_of_no_use_is_an_input_error(tmp_path, content, words):
    root = write(tmp_path, {"a/1.png": picture(1), "b/2.png": picture(2), "dataset.json": content})
    with pytest.raises(InputError, match=words):
        build(root)
    assert build(root, class_level=1).class_names == ["a", "b"]
    assert build(root, conditional=False).num_classes == 0


def test_dataset_json_may_be_the_list_itself_and_classes_without_an_image_are_said(tmp_path):
    files = {"a/1.png": picture(1), "b/2.png": picture(2), "Dataset.JSON": b'[["a/1.png", 3], ["b/2.png", 1]]'}
    dataset = build(write(tmp_path, files))
    assert labels(dataset) == [3, 1] and dataset.notes == ["no image is of classes 0, 2"]
    (note,) = build(tmp_path, conditional=False).notes
    assert note.startswith("its Dataset.JSON is not used")


def test_class_names_that_are_no_letters_can_be_kept(tmp_path):
    root = tmp_path / "set"
    for name in (b"\xe9t\xe9", b"hiver"):
        write(root / os.fsdecode(name), {"1.png": picture(1)})
    assert build(root).class_names == ["hiver", r"\udce9t\udce9"]


@pytest.mark.parametrize(
    "parts", ["seg_train seg_test", "train2017 val2017", "trainA trainB testA testB", "train val unlabeled"]
)
def test_parts_of_a_data_set_are_known_by_their_names(parts):
    assert are_parts(parts.split())
    assert not are_parts(["train", "plane", "car", "tram"]) and not are_parts(["strain", "contest", "evaluate"])


def test_dataset_json_of_something_else_is_no_matter(tmp_path):
    files = {"a/1.png": picture(1), "b/2.png": picture(2), "dataset.json": b'{"license": "CC0"}'}
    assert build(write(tmp_path, files)).class_names == ["a", "b"]
    files = {f"{part}/{name}": data for part in ("x", "y") for name, data in edm_style().items()}
    with pytest.raises(InputError, match=r"a part of the images only; fix: dataset.root=.*/x for that part"):
        build(write(tmp_path / "parts", files))


def test_train_and_val_are_asked_about(tmp_path):
    kinds = [f"{part}/{kind}/{i}.png" for part in ("train", "val") for kind in ("cat", "dog") for i in range(2)]
    root = write(tmp_path / "set", {name: picture(9 * i) for i, name in enumerate(kinds)})
    with pytest.raises(InputError) as caught:
        build(root)
    assert "train and val look like parts of a data set" in str(caught.value)
    for way in (f"dataset.root={root}/train", "dataset.class_level=2", "dataset.class_level=1"):
        assert way in str(caught.value)
    assert build(root / "train").summary() == "4 images, 2 classes: cat, dog"
    assert build(root, class_level=2).summary() == "8 images, 2 classes: cat, dog"
    assert build(root, class_level=1).summary() == "8 images, 2 classes: train, val"
    note = f"it has all of train (4), val (4); dataset.root={root}/... takes one of them"
    assert build(root, conditional=False).notes == [note]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, name in enumerate(kinds):
            archive.writestr(f"set/{name}", picture(9 * i))
    inner = build(tmp_path / "set.zip" / "set" / "train")
    assert inner.summary() == "4 images, 2 classes: cat, dog"
    assert inner.fingerprint() == build(root / "train").fingerprint()


def test_unused_folders_and_single_classes_are_said(tmp_path):
    root = write(tmp_path, {"cat/1.png": picture(1), "dog/1.png": picture(2), "dog/2.png": picture(3)})
    (note,) = build(root, conditional=False).notes
    assert note.startswith("its folders cat (1), dog (2) give no labels")
    with pytest.raises(InputError, match="in one class; got 'cat'"):
        build(write(tmp_path / "one", {"cat/1.png": picture(1)}), class_level=1)


def test_numbers_in_class_names_count_as_numbers(tmp_path):
    root = write(tmp_path, {f"{i}/1.png": picture(i) for i in (10, 2, 1, 100)})
    dataset = build(root)
    assert dataset.class_names == ["1", "2", "10", "100"]
    assert [int(dataset.class_names[label]) for label in labels(dataset)] == [1, 10, 100, 2]
    mixed = ["b", "a10", "a9", "a09", "", "a", "10b", "10a2", "10a10", "²", "9" * 5000]
    assert sorted(mixed, key=in_natural_order)[:4] == ["", "10a2", "10a10", "10b"]
    assert sorted(mixed, key=in_natural_order)[-5:] == ["a", "a09", "a9", "a10", "b", "²"][-5:]


def test_what_pillow_can_read_is_read_and_the_rest_is_counted(tmp_path):
    read = {"a.jfif": picture(1, "JPEG"), "b.JPE": picture(2, "JPEG"), "c.apng": picture(3)}
    root = write(tmp_path, read | {"d.heic": b"", "e.HEIC": b"", "f.jp2": b"", ".g.heic": b"", "notes.txt": b""})
    dataset = build(root, conditional=False)
    assert len(dataset) == 3
    assert dataset.notes[0].startswith("not read are 2 .heic (as 'd.heic'), 1 .jp2 (as 'f.jp2');")
    for name in read:
        (root / name).unlink()
    with pytest.raises(InputError, match=r"no images found; got .* which has 2 \.heic"):
        build(root, conditional=False)


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_what_is_left_out_is_written_down_once(tmp_path, memory_gb):
    files = {f"{i}.png": picture(i) if i % 2 else b"bad" for i in range(6)}
    root, path = write(tmp_path / "set", files | {"7\n8.png": b"bad"}), tmp_path / "left_out.txt"
    for _ in range(2):  # as two ranks, or a run and its resumption
        dataset = build(root, path, conditional=False, skip_broken=True, memory_gb=memory_gb)
        dataset.gather(torch.arange(len(dataset)))
    rows = sorted(line.split("\t") for line in path.read_text().splitlines())
    assert [name for name, _ in rows] == ["0.png", "2.png", "4.png", r"7\n8.png"]
    assert {reason for _, reason in rows} == {"not an image, or a damaged one"}


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_what_pillow_warns_of_names_the_file_once(tmp_path, capsys, memory_gb):
    exif, file = Image.Exif(), io.BytesIO()
    exif[270] = "a description of some length"
    Image.new("L", (8, 8), 9).save(file, "JPEG", exif=exif)
    data = file.getvalue().replace(b"MM\0*", b"MM\0*\x40", 1)  # its directory is where no data is
    dataset = build(write(tmp_path, {"a.jpg": data, "b.jpg": data, "c.jpg": picture(1)}), conditional=False)
    for _ in range(2):
        dataset.gather(torch.arange(3))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: '") and ".jpg' is read, but 'Corrupt EXIF data" in line


@pytest.mark.parametrize("root", ["", "  "])
def test_an_empty_root_is_refused(root):
    with pytest.raises(InputError, match=r"dataset\.root: it is empty, as a shell variable leaves it"):
        registry.settings("dataset", {"name": "image_folder", "root": root})


@pytest.mark.parametrize("during", ["listing", "looking", "decoding", "measuring"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_reason_to_stop_ends_the_reading_at_the_next_file(tmp_path, monkeypatch, kind, during):
    files, read = {f"{i}.png": picture(i) for i in range(40)}, []
    root = write(tmp_path / "set", files)
    if kind == "zip":
        root = tmp_path / "set.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    values = {"conditional": False, "memory_gb": 4.0 if during == "decoding" else 0.0}
    monkeypatch.setattr(decoder, "decode", lambda *args: read.append(args) or decode(*args))
    dataset = unread(root, **values)
    work = {
        "listing": lambda: unread(root, **values),
        "decoding": dataset.load,
        "looking": dataset.fingerprint,
        "measuring": dataset.sigma_data,
    }[during]
    with StopFlag(deadline=0.0), pytest.raises(Stopped):
        work()
    assert not read


def test_command_that_is_to_stop_while_it_reads_images_says_so(command, tmp_path):
    write(tmp_path / "set", {f"{i}.png": picture(i) for i in range(40)})
    options = [*TINY, "mode=ict", "dataset=image_folder", "dataset.root=set", "dataset.image_size=8"]
    for devices in ("1", "2"):
        done = command("train", *options, f"devices={devices}", "max_hours=0.000000001", f"name=x{devices}")
        assert done.returncode == 3, done.stderr
        assert "stopped before the first step; the same command starts again" in done.stderr


# ----------------------------------------------------------------------------------------------------------- decoding


def png_of_16_bits(levels, clear=None):
    """A grey PNG made by hand, since Pillow writes none with a transparent level of 16 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 0, 0, 0, 0)
    transparency = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    data = chunk(b"IHDR", header) + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def tiff_of_16_bits(levels, photometric):
    tags = [(256, levels.shape[1]), (257, levels.shape[0]), (258, 16), (259, 1), (262, photometric)]
    tags += [(273, 8 + 2 + 12 * 9 + 4), (277, 1), (278, levels.shape[0]), (279, levels.size * 2)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return header + entries + struct.pack("<I", 0) + levels.astype("<u2").tobytes()


LEVELS = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
IN_8_BITS = torch.from_numpy((LEVELS / 257 + 0.5).astype(np.uint8))[None]


def test_grey_of_16_bits_keeps_its_range_and_its_transparency():
    prepare()
    assert decode(png_of_16_bits(LEVELS), 8, 1, 0).equal(IN_8_BITS)
    clear = int(LEVELS[3, 4])
    shown = IN_8_BITS.clone()
    shown[0, 3, 4] = 7
    assert decode(png_of_16_bits(LEVELS, clear), 8, 1, 7).equal(shown)
    assert decode(png_of_16_bits(LEVELS, clear), 8, 3, 7).equal(shown.expand(3, 8, 8))
    assert decode(tiff_of_16_bits(LEVELS, photometric=1), 8, 1, 0).equal(IN_8_BITS)
    assert decode(tiff_of_16_bits(LEVELS, photometric=0), 8, 1, 0).equal(255 - IN_8_BITS), "where white is 0"


def test_panoramas_have_a_key(tmp_path):
    Image.new("L", (20_000, 10_000), 9).save(tmp_path / "wide.png")  # 200 million: Pillow refuses it by itself
    with pytest.raises(InputError, match=r"20000x10000 pixels are more than 89.48 million \(dataset.max_megapixels\)"):
        build(tmp_path, conditional=False)
    dataset = build(tmp_path, conditional=False, max_megapixels=200.0)
    assert dataset.gather(torch.tensor([0]))[0].unique().tolist() == [9]
