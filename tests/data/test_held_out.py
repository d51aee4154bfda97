"""Pictures that nobody trains on: which they are follows from what is in them, or from their names, and no more."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.core.settings import typed
from cm_train.data import description, fingerprint
from cm_train.data.datasets.image_folder import ImageFolder
from cm_train.data.held_out import usual_in_words, usual_share

HELD, LAZY = {"memory_gb": 4.0}, {"memory_gb": 0.0}
SHARE = 0.3


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photos(tmp_path):
    """Forty pictures below and above 8 KiB, of two classes; each fifth of a name is a variant: 3.bmp, 3-red.bmp, ..."""
    for i in range(40):
        place = tmp_path / "photos" / ("cat", "dog")[i // 5 % 2]
        place.mkdir(parents=True, exist_ok=True)
        side = 60 if i % 7 == 0 else 9
        noise = np.random.default_rng(i).integers(256, size=(side, side, 3), dtype=np.uint8)
        variant = ("", "-red", "-green", "-blue", "-old")[i % 5]
        Image.fromarray(noise).save(place / f"{i // 5}{variant}.bmp")
    return tmp_path / "photos"


def settings(root, **values):
    given = {"name": "image_folder", "root": str(root), "image_size": 8, "holdout": SHARE, "hflip": False}
    return registry.settings("dataset", given | values)


def build(root, **values):
    dataset = registry.build(settings(root, **values))
    dataset.load()
    return dataset


def everything(dataset):
    return dataset.gather(torch.arange(len(dataset)))


def by_hand(key):
    """Where in [0, 1) a picture is, without the code's help."""
    return int(hashlib.sha256(b"held out 1\n" + key).hexdigest()[:16], 16) / 16**16


def of_bytes(path):
    """What the place of a file hangs on: the first and last 4 KiB, and the size."""
    content = path.read_bytes()
    ends = content[:4096] + content[max(0, len(content) - 4096) :]
    return hashlib.sha256(ends).digest() + b" " + str(len(content)).encode()


def held_by_hand(root, share=SHARE):
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.bmp"))
    return [name for name in names if by_hand(of_bytes(root / name)) < share]


def zipped(path, folder, top="", compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*.bmp"), reverse=True):
            archive.write(file, f"{top}{file.relative_to(folder)}")
    return path


# ---------------------------------------------------------------------------------------------------------- which side


def test_what_is_held_out_follows_from_the_bytes_wherever_they_lie_and_however_they_are_held(photos, tmp_path):
    expected = held_by_hand(photos)
    assert 4 < len(expected) < 20
    roots = [photos, zipped(tmp_path / "a.zip", photos), zipped(tmp_path / "b.zip", photos, "photos/")]
    roots.append(zipped(tmp_path / "stored.zip", photos, compression=zipfile.ZIP_STORED))
    whole = build(photos, holdout=0.0, conditional=True)
    images, labels = everything(whole)
    is_held = torch.tensor([name in expected for name in whole.names])
    for root in roots:
        for where in (HELD, LAZY):
            for part, mask in (("train", ~is_held), ("held_out", is_held)):
                found = build(root, part=part, conditional=True, **where)
                assert found.lazy == (where is LAZY)
                assert len(found) == mask.sum() == len(found.names)
                assert found.num_held_out == (len(expected) if part == "train" else 0)
                assert [name in expected for name in found.names] == is_held[mask].tolist()
                assert everything(found)[0].equal(images[mask]) and everything(found)[1].equal(labels[mask])
                assert found.class_names == ["cat", "dog"]
                assert found.all_labels().equal(labels[mask])
    train = build(photos)
    assert train.sigma_data() == build(photos, **LAZY).sigma_data() != whole.sigma_data()
    assert train.notes[0] == f"held out {len(expected)} of 40 pictures, for cm-eval"
    assert train.summary() == f"{40 - len(expected)} images, no classes"


def test_pictures_that_come_later_move_no_other_one_and_copies_are_on_one_side(photos):
    before = {part: set(build(photos, part=part).names) for part in ("train", "held_out")}
    for name in sorted(before["train"] | before["held_out"])[:20]:
        shutil.copy(photos / name, photos / "dog" / f"copy-{name.replace('/', '-')}")
    Image.new("RGB", (9, 9)).save(photos / "new.bmp")
    after = {part: set(build(photos, part=part).names) for part in before}
    for part in before:
        assert before[part] <= after[part]
        copied = {name for name in after[part] if "copy-" in name}
        originals = {re.sub(r"^dog/copy-(cat|dog)-", r"\1/", name) for name in copied}
        assert originals <= before[part]
    assert sum(map(len, after.values())) == 61


def test_a_larger_share_holds_out_the_same_pictures_and_more(photos):
    small, large = (set(build(photos, part="held_out", holdout=share).names) for share in (0.1, 0.5))
    assert small < large == set(held_by_hand(photos, 0.5))


def test_the_classes_are_those_of_all_pictures(photos):
    """Were they those of a part, a number would mean another class in the other one."""
    expected = held_by_hand(photos)
    for name in set(expected) - {expected[0]}:
        (photos / "cat" / name.replace("/", "-")).write_bytes((photos / name).read_bytes())
        (photos / name).unlink()
    (photos / "ape").mkdir()
    shutil.move(photos / expected[0], photos / "ape" / "only.bmp")
    train, held = (build(photos, part=part, conditional=True) for part in ("train", "held_out"))
    assert train.class_names == held.class_names == ["ape", "cat", "dog"]
    assert 0 not in everything(train)[1] and 0 in everything(held)[1]
    assert "no image is of class ape" in train.notes
    assert [note for note in held.notes if "ape" in note] == []


def test_a_group_keeps_variants_on_one_side(photos, tmp_path):
    pattern = r"(cat|dog)/(\d+)(?:-\w+)?[.]bmp"
    bases = {f"{place}{i}" for i in range(8) for place in [("cat", "dog")[i % 2]]}
    expected = {base for base in bases if by_hand(base.encode()) < SHARE}
    assert 0 < len(expected) < 8
    nested = tmp_path / "nested"
    shutil.copytree(photos, nested / "more" / "photos")
    for root in (photos, zipped(tmp_path / "a.zip", photos), nested):
        for where in (HELD, LAZY):
            held = build(root, part="held_out", group=pattern, **where)
            assert {"".join(re.search(r"(cat|dog)/(\d)", name).groups()) for name in held.names} == expected
            assert len(held) == 5 * len(expected)
    train = build(photos, group=pattern)
    assert train.notes[0].endswith("for cm-eval; 40 of them in 8 groups by their names")
    assert len(train) + len(held) == 40
    without = build(photos, part="held_out", group="cat|dog/[0-3]")  # all that it finds, where it has no groups
    assert sum(name.startswith("cat") for name in without.names) in (0, 20)


def test_where_a_group_is_not_found_the_content_counts(photos):
    held = build(photos, part="held_out", group=r"cat/(\d)")
    dogs = [name for name in held.names if name.startswith("dog")]
    assert dogs == [name for name in held_by_hand(photos) if name.startswith("dog")]
    assert held.notes[0].endswith("20 of them in 4 groups by their names, the other 20 by their content")


def spoil(root, name, is_held):
    """Make a file one that is no picture, and on the wanted side."""
    for attempt in range(1000):
        (root / name).write_bytes(b"no picture %d" % attempt)
        if (name in held_by_hand(root)) == is_held:
            return
    pytest.fail("all on one side")


@pytest.mark.parametrize("where", [HELD, LAZY], ids=["held", "lazy"])
def test_what_is_held_out_never_stands_in_for_a_broken_file(photos, where):
    expected = held_by_hand(photos)
    train = build(photos, **where)
    broken = train.names[3]
    spoil(photos, broken, is_held=False)
    with pytest.raises(InputError, match=f"{broken}.* can't be decoded"):
        everything(build(photos, **where))
    known = everything(train)[0] if where is HELD else everything(build(photos, holdout=0.0, skip_broken=True))[0]
    found = build(photos, skip_broken=True, **where)
    pixels = {image.numpy().tobytes() for image in everything(found)[0]}
    assert len(pixels) == 39 - len(expected) and pixels <= {image.numpy().tobytes() for image in known}
    held = {image.numpy().tobytes() for image in everything(build(photos, part="held_out"))[0]}
    assert len(held) == len(expected) and not held & pixels


def test_a_broken_file_that_is_held_out_is_no_matter_to_who_trains(photos):
    train = build(photos)
    held = held_by_hand(photos)[0]
    spoil(photos, held, is_held=True)
    assert everything(build(photos))[0].equal(everything(train)[0])
    with pytest.raises(InputError, match=f"{held}.* can't be decoded"):
        build(photos, part="held_out")


# ---------------------------------------------------------------------------------------------------------- fingerprint


def of_whole(root):
    """The fingerprint of all pictures, without the code's help."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.bmp"))
    ends = hashlib.sha256(b"".join(of_bytes(root / name)[:32] for name in names)).hexdigest()
    listed = json.dumps([[8, 3, 255, [], None], ends])
    listed += "".join(json.dumps([name, (root / name).stat().st_size]) for name in names)
    return f"images:{hashlib.sha256(listed.encode()).hexdigest()}"


def test_parts_are_told_apart_and_all_of_them_are_what_they_were(photos, tmp_path):
    whole = of_whole(photos)
    first: list[str] = []
    for where in (HELD, LAZY):
        for root in (photos, zipped(tmp_path / "a.zip", photos)):
            for values in ({"holdout": 0.0}, {"holdout": 0.0, "group": "cat"}):
                assert build(root, **values, **where).fingerprint() == whole
            parts = [{"part": part, **more} for part in ("train", "held_out") for more in OTHERS]
            names = [build(root, **values, **where).fingerprint() for values in parts]
            assert len(set(names)) == len(names) and whole not in names
            assert all(name.startswith(whole) for name in names)
            first = first or names
            assert first == names, "in memory and on the fly, in a folder and a zip"


OTHERS = ({}, {"holdout": 0.5}, {"group": r"(\d)"}, {"group": r"/(\d)"})


def test_a_set_knows_its_pictures_with_others_held_out(photos):
    train, whole = build(photos), build(photos, holdout=0.0)
    images = whole.gather(torch.arange(40))[0]
    of_pixels = fingerprint.of_pixels(tuple(images.shape), [images], None)  # as an early version had it
    for recorded in (whole.fingerprint(), of_pixels, build(photos, holdout=0.5).fingerprint()):
        assert train.shares_images_with(recorded) and not train.is_known_as(recorded)
        assert not train.was_known_as(recorded), "a run goes on with what it began with"
    assert whole.is_known_as(of_pixels) and whole.shares_images_with(train.fingerprint())
    assert train.is_known_as(train.fingerprint()) and train.was_known_as(train.fingerprint())
    (photos / "dog" / "1.bmp").unlink()
    assert not build(photos).shares_images_with(train.fingerprint())
    assert not train.shares_images_with("0" * 64)


def test_files_are_looked_at_once_for_all_parts(photos, monkeypatch):
    name = build(photos, **LAZY).fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "look", lambda *_: pytest.fail("looked again"))
        assert build(photos, **HELD).fingerprint() == build(photos, **LAZY).fingerprint() == name
        assert len(build(photos, part="held_out")) + len(build(photos)) == 40
    expected = build(photos, part="held_out").names
    for file in Path(os.environ["XDG_CACHE_HOME"]).glob("cm-train/fingerprints/*"):
        content = bytearray(file.read_bytes())
        content[5] ^= 255
        file.write_bytes(content)
    assert build(photos, part="held_out").names == expected, "a damaged cache is no matter"


# ------------------------------------------------------------------------------------------------------------- settings


def test_auto_is_a_twentieth_where_that_is_64_pictures():
    assert [usual_share(count) for count in (1, 1279, 1280, 3786)] == [0, 0, 0.05, 0.05]
    assert usual_in_words(3786, 0.05) == "holding out 5%, about 189 of 3,786 pictures, for cm-eval"
    assert "holding out none: of 900 pictures, 5% are too few" in usual_in_words(900, 0.0)


def test_facts_count_what_is_trained_on(photos, monkeypatch):
    facts = settings(photos).facts(64)
    assert (facts.count, facts.held_out, facts.remarks) == (28, SHARE, ())
    facts = settings(photos, holdout="auto").facts(64)
    assert (facts.count, facts.held_out) == (40, 0) and "holding out none" in facts.remarks[-1]
    monkeypatch.setattr("cm_train.data.held_out._LEAST", 2)
    facts = settings(photos, holdout="auto").facts(64)
    assert (facts.count, facts.held_out) == (38, 0.05) and "about 2 of 40" in facts.remarks[-1]


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "cifar10"])
def test_of_a_published_set_its_test_split_is_held_out(name):
    train = registry.settings("dataset", {"name": name, "split": "train"})
    assert train.held_out() == registry.settings("dataset", {"name": name, "split": "test"})
    assert train.held_out().held_out() is None and train.whole() is train
    if name == "digits":
        assert registry.settings("dataset", {"name": name}).held_out() is None
        parts = [registry.build(config) for config in (train, train.held_out())]
        seen = [{image.numpy().tobytes() for image in part.images} for part in parts]
        assert sum(map(len, parts)) == 1797 and not seen[0] & seen[1]


def test_of_own_pictures_the_rest_is_held_out(photos):
    config = settings(photos, group="cat|dog")
    assert config.held_out() == settings(photos, group="cat|dog", part="held_out")
    assert config.whole() == settings(photos, holdout=0.0)
    assert settings(photos, holdout=0.0).held_out() is None
    stored = {key: value for key, value in config.model_dump().items() if key not in ("holdout", "group", "part")}
    assert typed(ImageFolder.Config, stored).holdout == 0, "a run that knew of none has none"


def test_description_is_of_what_is_trained_on(photos):
    dataset = build(photos, conditional=True)
    found = description.describe(dataset)
    num = len(held_by_hand(photos))
    assert (found["images"], found["held_out"], found["looked_at"]) == (40 - num, num, 40 - num)
    assert sum(found["classes"].values()) == sum(found["sizes"].values()) == 40 - num
    assert f"held out {num} of 40 pictures, for cm-eval" in description.lines(found)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"holdout": 1.0}, r"dataset\.holdout: input should be less than 1; got '1.0'"),
        ({"holdout": -0.1}, r"dataset\.holdout: input should be greater than or equal to 0; got '-0.1'"),
        ({"holdout": "some"}, r"dataset\.holdout: .*got 'some'"),
        ({"group": "("}, r"dataset\.group is no regular expression: .*; got '\('; fix: mend it, or drop"),
        ({"group": "a{99999999999}"}, r"dataset\.group is no regular expression"),
        ({"group": "(?P<x>"}, r"dataset\.group is no regular expression"),
        ({"group": " "}, r"dataset\.group: .*empty"),
        ({"group": "owl"}, r"dataset\.group finds nothing .*; got 'owl'; allowed: .*'cat/0-blue\.bmp'; fix:"),
        ({"group": "x*"}, r"dataset\.group finds nothing"),
        ({"group": "bmp"}, r"dataset\.group puts all pictures in .* into one group, 'bmp'; .*fix:"),
        ({"holdout": 1e-9}, r"dataset\.holdout=1e-09 holds out none of the 40 pictures in .*; fix: a larger"),
        ({"holdout": 1 - 1e-9}, r"dataset\.holdout=0.999999999 holds out all of the 40 pictures in .*; fix: a smaller"),
        ({"holdout": 1e-9, "group": r"(\d)"}, r"holds out none .*; got '40 of them in 8 groups by their names'; fix:"),
        ({"holdout": 0.0, "part": "held_out"}, "no pictures of .* are held out"),
        ({"part": "test"}, r"dataset\.part: .*'train' or 'held_out'"),
    ],
)
def test_what_holds_out_nothing_or_all_is_an_input_error(photos, values, words):
    with pytest.raises(InputError, match=words) as error:
        build(photos, **values)
    assert "\n" not in str(error.value)
