"""Data sets: shapes, labels, fingerprints, and what untidy or hostile files do."""

import errno
import gzip
import hashlib
import io
import os
import pickle
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import yaml
from PIL import Image

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.core.settings import typed
from cm_train.data.datasets.in_memory import InMemory
from cm_train.data.decoding import decode, prepare
from conftest import wait_for

CONF = Path(__file__).parents[2] / "conf" / "dataset"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
OLD_PILLOW = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="reads no YCbCr that it has written")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def build(name, **values):
    dataset = registry.make("dataset", {"name": name, **values})
    dataset.load()
    return dataset


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(color=RED, size=(8, 8)):
    return encoded(Image.new("RGB", size, color))


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def zipped(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def folder(root, **values):
    return build("image_folder", **{"root": str(root), "image_size": 8, **values})


def everything(dataset):
    return dataset.gather(torch.arange(len(dataset)))


def colors(dataset):
    """The colour of each image of one colour."""
    return [tuple(image[:, 0, 0].tolist()) for image in everything(dataset)[0]]


# Every set


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "cifar10", "image_folder"])
def test_yaml_holds_every_setting_at_its_default(name):
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert values["name"] == name
    cls = registry.find("dataset", name)
    fields = dict(cls.Config.model_fields)
    if name == "image_folder":
        assert values["root"] == "???"
        for key in ("image_size", "holdout"):
            assert values[key] == "auto"  # which is settled before there is a set
            values[key] = fields[key].default
        del fields["part"]  # which whoever evaluates sets, and no run
    assert values.keys() == fields.keys()
    required = {"root": values["root"]} if "root" in values else {}
    assert typed(cls.Config, values) == cls.Config(**required)


def in_memory(**changes):
    images = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).view(4, 3, 2, 2)
    return InMemory(**{"images": images, "labels": torch.tensor([0, 1, 1, 0]), "class_names": ["a", "b"], **changes})


def test_gather_gives_images_and_labels_in_the_order_asked():
    images, labels = in_memory().gather(torch.tensor([2, 0, 2]))
    assert images[:, 0, 0, 0].tolist() == [24, 0, 24] and images.dtype == torch.uint8
    assert labels.tolist() == [1, 0, 1] and labels.dtype == torch.int64


def test_gather_gives_no_labels_where_there_are_no_classes():
    dataset = in_memory(labels=None)
    assert dataset.num_classes == 0 and dataset.gather(torch.tensor([0]))[1] is None


def test_fingerprint_changes_with_pixels_labels_and_shape_only():
    images = in_memory().images
    changed = images.clone()
    changed[3, 2, 1, 1] += 1
    others = [
        in_memory(images=changed),
        in_memory(images=images.flip(0)),
        in_memory(images=images.view(4, 12, 1, 1)),
        in_memory(labels=torch.tensor([0, 1, 1, 1])),
        in_memory(labels=None),
    ]
    assert in_memory().fingerprint() == in_memory().fingerprint()
    assert len({dataset.fingerprint() for dataset in [in_memory(), *others]}) == 6


def test_sigma_data_is_the_standard_deviation_of_all_pixels():
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (images.double() / 127.5 - 1).std(correction=0).item()
    assert in_memory(images=images, labels=None).sigma_data() == pytest.approx(expected, rel=1e-12)


def test_sigma_data_refuses_a_set_of_one_colour():
    with pytest.raises(InputError, match="one colour"):
        in_memory(images=torch.full((4, 3, 2, 2), 7, dtype=torch.uint8)).sigma_data()


def test_to_keeps_a_set_on_the_host_that_is_too_large_for_the_gpu(monkeypatch):
    moved: list[torch.device] = []

    def move(tensor, device):
        moved.append(device)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", move)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 48 - 1, 1000))  # the images have 48 bytes
    in_memory().to("cuda")
    assert not moved
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 48, 1000))
    in_memory().to("cuda")
    assert moved == [torch.device("cuda")] * 2


# Digits


def test_digits_are_all_of_scikit_learns():
    from sklearn.datasets import load_digits

    dataset, original = build("digits", conditional=True), load_digits()
    images, labels = everything(dataset)
    assert images.shape == (1797, 1, 8, 8) and dataset.num_classes == 10
    assert (images[:, 0].numpy() == np.round(original.images * 255 / 16)).all()
    assert (labels.numpy() == original.target).all()
    assert dataset.sigma_data() == pytest.approx(0.752, abs=2e-3)


def test_digits_splits_share_no_image_and_miss_none():
    whole, train, test = (build("digits", split=split) for split in ("all", "train", "test"))
    rows = [sorted(map(tuple, everything(d)[0].flatten(1).tolist())) for d in (whole, train, test)]
    assert (len(train), len(test)) == (1437, 360) and sorted(rows[1] + rows[2]) == rows[0]


def test_digits_held_out_images_never_change():
    labels = everything(build("digits", split="test", conditional=True))[1]
    assert labels.bincount().tolist() == [33, 46, 38, 42, 33, 38, 35, 28, 36, 31]


def test_digits_name_scikit_learn_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("cm_train.data.datasets.digits.find_spec", lambda name: None)
    with pytest.raises(InputError, match="scikit-learn, which is not installed; fix: pip install"):
        build("digits")


# Published sets


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


TRAIN, TEST = (np.random.default_rng(n).integers(256, size=(n, 28, 28), dtype=np.uint8) for n in (6, 4))
MNIST = {
    "train-images-idx3-ubyte": idx(TRAIN),
    "train-labels-idx1-ubyte": idx(np.arange(6) % 3),
    "t10k-images-idx3-ubyte": idx(TEST),
    "t10k-labels-idx1-ubyte": idx(np.arange(4)),
}
PACKED = {f"{name}.gz": gzip.compress(content) for name, content in MNIST.items()}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture
def few(monkeypatch):
    """MNIST as above is whole."""
    monkeypatch.setattr("cm_train.data.datasets.torchvision_sets._IdxSet.counts", {"train": 6, "test": 4})


@pytest.fixture
def published(monkeypatch, website):
    """The archives above are those that torchvision knows, and at home on `website`."""
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in PACKED.items()]
    monkeypatch.setattr("torchvision.datasets.MNIST.resources", sums)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [f"{website.url}/lost/", f"{website.url}/"])
    website.files = {f"/{name}": content for name, content in PACKED.items()}
    return website


def mnist(root, files=MNIST, name="mnist", where="MNIST", **values):
    write(root / where / "raw", files)
    return build(name, **{"root": str(root), "download": False, **values})


def listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize("files", [MNIST, PACKED])
@pytest.mark.parametrize(("name", "where"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_kinds_give_the_split_asked_for_and_leave_the_folder_as_it_is(tmp_path, few, files, name, where):
    dataset = mnist(tmp_path, files, name, where, conditional=True)
    before = listing(tmp_path)
    images, labels = everything(dataset)
    assert (images.numpy()[:, 0] == TRAIN).all() and labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert labels.dtype == torch.int64
    assert (dataset.image_size, dataset.channels, dataset.num_classes, dataset.hflip) == (28, 1, 10, False)
    images, labels = everything(build(name, root=str(tmp_path), split="test"))
    assert (images.numpy()[:, 0] == TEST).all() and labels is None
    assert listing(tmp_path) == before


def test_mnist_packed_by_others_is_used_with_a_note(tmp_path, few, published):
    own = {**PACKED, f"{IMAGES}.gz": gzip.compress(MNIST[IMAGES], 1)}
    whole, others = mnist(tmp_path / "published", PACKED), mnist(tmp_path / "others", own)
    assert whole.fingerprint() == others.fingerprint() == mnist(tmp_path / "unpacked", MNIST).fingerprint()
    assert not whole.notes
    (note,) = others.notes
    assert note.startswith(f"{IMAGES}.gz: another md5 than published")


def flipped(content):
    """A bit of the last pixels is another."""
    return content[:-12] + bytes([content[-12] ^ 1]) + content[-11:]


STORED = gzip.compress(MNIST[IMAGES], 0)  # as it is, so that only the checksum can tell
DAMAGES = {
    "nothing": (f"{IMAGES}.gz", b"", "ends after 0 bytes"),
    "text": (f"{IMAGES}.gz", b"half of it", "Not a gzipped file"),
    "half": (f"{IMAGES}.gz", PACKED[f"{IMAGES}.gz"][:2000], "ended before the end-of-stream"),
    "bit": (f"{IMAGES}.gz", flipped(STORED), "CRC check failed"),
    "header": (IMAGES, MNIST[IMAGES][:9], "ends after 9 bytes"),
    "cut": (IMAGES, MNIST[IMAGES][:2000], "ends after 1984 of 4704 values"),
    "longer": (IMAGES, MNIST[IMAGES] + b"0", "goes on after its 4704 values"),
    "labels": (IMAGES, MNIST[LABELS], "begins with the bytes 00000801, where 00000803 belongs"),
    "fewer": (f"{IMAGES}.gz", PACKED["t10k-images-idx3-ubyte.gz"], "holds 4x28x28 values, not 6x28x28"),
    "larger": (IMAGES, idx(np.zeros((6, 32, 32))), "holds 6x32x32 values, not 6x28x28"),
    "eleven": (LABELS, idx(np.array([0, 1, 2, 10, 1, 2])), "holds the label 10"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_mnist_damaged_file_is_named_with_what_is_wrong(tmp_path, few, damage):
    name, content, reason = DAMAGES[damage]
    with pytest.raises(InputError) as caught:
        mnist(tmp_path, {name: content})
    home, archive = tmp_path / "MNIST" / "raw", f"{name.removesuffix('.gz')}.gz"
    assert str(caught.value).startswith(f"{name} in {home} is damaged, or another file; got ")
    assert reason in str(caught.value)
    assert f"; fix: delete it, then put {archive} into {home}, or set dataset.root to" in str(caught.value)


def test_mnist_unpacks_no_more_than_it_should_hold(tmp_path, few):
    bomb = gzip.compress(MNIST[IMAGES] + bytes(100_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="goes on after its 4704 values"):
            mnist(tmp_path, {f"{IMAGES}.gz": bomb})
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_mnist_that_can_not_be_read_now_is_not_damaged(tmp_path, few, monkeypatch):
    mnist(tmp_path, PACKED)
    left, real = [2], os.open

    def sometimes(path, *args, **kwargs):
        if LABELS in str(path) and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("cm_train.core.files._RETRY_AFTER_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "open", sometimes)
    assert len(mnist(tmp_path, {})) == 6 and left == [0]
    left[0] = 10**9
    with pytest.raises(InputError, match=f"{LABELS}.gz can't be read now"):
        mnist(tmp_path, {})


def test_mnist_does_not_wait_for_a_pipe(tmp_path, few):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    os.mkfifo(tmp_path / "MNIST" / "raw" / IMAGES)
    with pytest.raises(InputError, match="not a regular file"):
        mnist(tmp_path, {})


def test_mnist_missing_is_downloaded_as_it_is(tmp_path, few, published):
    dataset = build("mnist", root=str(tmp_path / "none"), conditional=True)
    assert (everything(dataset)[0].numpy()[:, 0] == TRAIN).all() and not dataset.notes
    assert listing(tmp_path) == ["none", "none/MNIST", "none/MNIST/raw"] + [
        f"none/MNIST/raw/{name}" for name in (f"{IMAGES}.gz", f"{LABELS}.gz")
    ]
    asked = len(published.asked)
    assert len(build("mnist", root=str(tmp_path / "none"))) == 6 and len(published.asked) == asked


def test_mnist_is_downloaded_once_by_ranks_that_start_together(tmp_path, few, published):
    published.holds[f"/{IMAGES}.gz"] = threading.Event()
    built = []
    ranks = [threading.Thread(target=lambda: built.append(build("mnist", root=str(tmp_path)))) for _ in range(3)]
    for rank in ranks:
        rank.start()
    wait_for(lambda: f"/{IMAGES}.gz" in published.asked)
    published.holds[f"/{IMAGES}.gz"].set()
    for rank in ranks:
        rank.join(60)
    assert len({dataset.fingerprint() for dataset in built}) == 1 and len(built) == 3
    assert sorted(published.asked) == sorted(f"{way}{name}.gz" for way in ("/", "/lost/") for name in (IMAGES, LABELS))


def test_mnist_of_a_mirror_with_other_files_is_an_error_that_names_it(tmp_path, few, published):
    published.files[f"/{IMAGES}.gz"] = b"something else"
    home = tmp_path / "MNIST" / "raw"
    with pytest.raises(InputError) as caught:
        build("mnist", root=str(tmp_path))
    assert str(caught.value).startswith(f"MNIST is not in {home} and can't be downloaded; got ")
    assert f"{published.url}/{IMAGES}.gz: what came has the md5 " in str(caught.value)
    assert str(caught.value).endswith(
        f"fix: put {IMAGES}.gz, {LABELS}.gz into {home}, or set dataset.root to where MNIST is"
    )
    assert not list(home.iterdir())


def test_mnist_missing_offline_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match="not in .*MNIST/raw and can't be downloaded.*refused.*fix: put train-im"):
        build("mnist", root=str(tmp_path))


def test_mnist_missing_without_download_creates_nothing(tmp_path, few):
    with pytest.raises(InputError, match="is not in .*dataset.download=true"):
        build("mnist", root=str(tmp_path / "none"), download=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match=f"dataset.download=true, or put {LABELS}.gz into"):
        mnist(tmp_path, {"t10k-labels-idx1-ubyte": b"", f"{IMAGES}.gz": PACKED[f"{IMAGES}.gz"]})


PIXELS = np.random.default_rng(0).integers(256, size=(6, 2, 3072), dtype=np.uint8)
CLASSES = np.arange(12).reshape(6, 2) % 10
BATCHES = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]


@pytest.fixture
def small(monkeypatch):
    """CIFAR-10 has two images in a batch."""
    monkeypatch.setattr("cm_train.data.datasets.torchvision_sets.CIFAR10.rows", 2)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_channels_first_and_flipped_and_leaves_the_folder_as_it_is(tmp_path, small, packed):
    files = {
        name: pickle.dumps({"data": PIXELS[n], "labels": CLASSES[n].tolist()}, protocol=2)
        for n, name in enumerate(BATCHES)
    }
    if packed:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            for name in sorted(files, reverse=True):  # in another order, as in the real one
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(files[name])
                archive.addfile(member, io.BytesIO(files[name]))
    else:
        write(tmp_path / "cifar-10-batches-py", files)
    before = listing(tmp_path)
    dataset = build("cifar10", root=str(tmp_path), download=False, conditional=True)
    images, labels = everything(dataset)
    assert (images.numpy() == PIXELS[:5].reshape(10, 3, 32, 32)).all() and labels.tolist() == list(range(10))
    assert dataset.hflip and dataset.class_names[:2] == ["airplane", "automobile"] and dataset.num_classes == 10
    assert len(dataset.notes) == packed
    images, labels = everything(build("cifar10", root=str(tmp_path), download=False, split="test"))
    assert (images.numpy() == PIXELS[5].reshape(2, 3, 32, 32)).all() and labels is None
    assert listing(tmp_path) == before


def test_cifar10_damaged_is_named_with_what_is_wrong(tmp_path, small):
    write(tmp_path, {"cifar-10-python.tar.gz": b"half of it"})
    with pytest.raises(InputError, match="cifar-10-python.tar.gz in .* is damaged.*Not a gzipped.*fix: delete it"):
        build("cifar10", root=str(tmp_path), download=False)
    write(tmp_path / "cifar-10-batches-py", {"data_batch_1": b"half of it"})
    with pytest.raises(InputError, match="cifar-10-batches-py in .* is damaged.*data_batch_1.*fix: delete it and run"):
        build("cifar10", root=str(tmp_path), download=False)


def test_cifar10_missing_names_the_archive(tmp_path):
    with pytest.raises(InputError, match="CIFAR10 is not in .*put cifar-10-python.tar.gz into"):
        build("cifar10", root=str(tmp_path), download=False)


# Image folders: finding and labelling


MIXED = {
    "top/dog/deep/er/1.png": picture(GREEN),
    "top/cat/2.PNG": picture(RED),
    "top/cat/1.png": picture(BLUE),
    "top/.hidden/1.png": picture(),
    "top/cat/._1.png": b"resource fork",
    "top/readme.txt": b"not an image",
    "__MACOSX/top/cat/1.png": b"junk",
}


@pytest.fixture(params=["folder", "zip", "lazy"])
def mixed(request, tmp_path):
    root = zipped(tmp_path / "mixed.zip", MIXED) if request.param == "zip" else write(tmp_path / "mixed", MIXED)
    return folder(root, conditional=True, memory_gb=0.0 if request.param == "lazy" else 4.0)


def test_image_folder_finds_images_at_any_depth_in_order(mixed):
    assert colors(mixed) == [BLUE, RED, GREEN]


def test_image_folder_classes_are_the_first_folders_that_divide_the_images(mixed):
    assert mixed.class_names == ["cat", "dog"] and mixed.num_classes == 2
    assert everything(mixed)[1].tolist() == [0, 0, 1]


def test_image_folder_gathers_in_the_order_asked(mixed):
    images, labels = mixed.gather(torch.tensor([2, 0, 2, 1]))
    assert [tuple(i[:, 3, 3].tolist()) for i in images] == [GREEN, BLUE, GREEN, RED] and labels.tolist() == [1, 0, 1, 0]


def test_image_folder_unconditional_needs_no_folders(tmp_path):
    dataset = folder(write(tmp_path, {"1.png": picture()}))
    assert dataset.num_classes == 0 and everything(dataset)[1] is None


@pytest.mark.parametrize("files", [["1.png", "2.png"], ["only/1.png"], ["a/1.png", "b/1.png", "stray.png"]])
def test_image_folder_conditional_needs_every_image_in_a_class(tmp_path, files):
    with pytest.raises(InputError, match="needs every image in a folder of its class"):
        folder(write(tmp_path, {name: picture() for name in files}), conditional=True)


def test_image_folder_follows_links_but_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere", {"1.png": picture(GREEN)})
    write(tmp_path / "set", {"a/1.png": picture(RED)})
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self").symlink_to("self")
    assert colors(folder(tmp_path / "set")) == [RED, GREEN]


def test_lazy_and_held_sets_hold_the_same_images(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(70, 9, 12, 3), dtype=np.uint8)
    root = write(tmp_path, {f"{i:03}.png": encoded(Image.fromarray(noise[i])) for i in range(70)})
    held, lazy = folder(root), folder(root, memory_gb=70 * 192 / 1e9 - 1e-9)
    assert (held.lazy, lazy.lazy) == (False, True)
    assert everything(held)[0].equal(everything(lazy)[0])
    assert held.sigma_data() == lazy.sigma_data()


def test_lazy_sigma_data_looks_at_a_fixed_subset(tmp_path, monkeypatch):
    monkeypatch.setattr("cm_train.data.datasets.base._SIGMA_IMAGES", 3)
    lazy = folder(write(tmp_path, {f"{i}.png": picture((i, 2 * i, 0)) for i in range(20)}), memory_gb=0.0)
    gather, seen = lazy.gather, []

    def spy(index):
        seen.append(index.tolist())
        return gather(index)

    monkeypatch.setattr(lazy, "gather", spy)
    assert lazy.sigma_data() == lazy.sigma_data()
    assert seen[0] == seen[1] and len(set(seen[0])) == 3


# Image folders: decoding


def decoded(data, image_size=8, channels=3, background=255):
    prepare()
    return decode(data, image_size, channels, background)


def test_decode_shows_the_background_through_every_kind_of_transparency():
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((*RED, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*RED, *GREEN])
    palette.paste(0, (0, 0, 4, 8))
    keyed = Image.new("RGB", (8, 8), GREEN)
    keyed.paste(RED, (0, 0, 4, 8))
    files = [
        encoded(half),
        encoded(half, "WEBP", lossless=True),
        encoded(palette, transparency=1),
        encoded(palette, transparency=bytes([255, 0])),
        encoded(palette, "GIF", transparency=1),
        encoded(keyed, transparency=GREEN),
    ]
    for data in files:
        image = decoded(data, background=100)
        assert image[:, 4, 1].tolist() == [255, 0, 0] and image[:, 4, 6].tolist() == [100, 100, 100]


def test_decode_blends_partial_transparency():
    assert decoded(encoded(Image.new("LA", (8, 8), (0, 51))), background=200)[:, 0, 0].tolist() == [160] * 3


def test_decode_blends_before_it_scales():
    image = Image.new("RGBA", (64, 64), (*RED, 0))  # invisible red must not bleed into the edge
    image.paste((*BLUE, 255), (0, 0, 32, 64))
    small = decoded(encoded(image))
    assert small[:, 4, 7].tolist() == [*WHITE] and small[0].equal(small[1])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode_scales_16_bit_grey_instead_of_clipping_it(kind):
    deep = np.full((8, 8), 257 * 100 + 100, dtype=np.uint16)
    assert decoded(encoded(Image.fromarray(deep), kind)).unique().tolist() == [100]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", pytest.param("YCbCr", marks=OLD_PILLOW)])
def test_decode_reads_every_common_mode(mode):
    data = encoded(Image.new("RGB", (8, 8), WHITE).convert(mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    for channels in (1, 3):
        result = decoded(data, channels=channels)
        assert result.shape == (channels, 8, 8) and result.min() >= 254


def test_decode_reads_cmyk_jpeg():
    red = decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[:, 4, 4].tolist()
    assert red[0] > 240 and max(red[1:]) < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_turns_photos_upright(orientation):
    upright = Image.new("RGB", (16, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    upright.paste(BLUE, (8, 0, 16, 8))
    undo = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # Pillow's numbers of the transpositions that undo each
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decoded(encoded(stored, exif=exif))
    assert image[:, 1, 1].tolist() == [*RED] and image[:, 1, 6].tolist() == [*BLUE]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_decode_survives_damaged_exif():
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    assert decoded(encoded(Image.new("RGB", (8, 8), RED), "JPEG", exif=exif)).shape == (3, 8, 8)


def test_decode_cuts_the_central_square_without_distortion():
    wide = Image.new("RGB", (40, 20), WHITE)
    wide.paste(RED, (10, 0, 30, 20))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert (decoded(encoded(image), 10)[1:, 1:-1, 1:-1] == 0).all()


@pytest.mark.parametrize("size", [(8, 8), (8, 11), (13, 8)])
def test_decode_does_not_blur_what_needs_no_scaling(size):
    noise = np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    left, top = (size[0] - 8) // 2, (size[1] - 8) // 2
    expected = noise[top : top + 8, left : left + 8].transpose(2, 0, 1)
    assert (decoded(encoded(Image.fromarray(noise))).numpy() == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_decode_antialiases(kind):
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)  # its mean is grey; single pixels are not
    image = decoded(encoded(Image.fromarray(board), kind, **({"quality": 95} if kind == "JPEG" else {})))
    assert (image.int() - 128).abs().max() <= 3


# Image folders: hostile and broken input


def claiming(side):
    """A PNG of a few bytes that claims side x side pixels."""
    data = bytearray(picture())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def broken_files():
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(256, size=(50, 50, 3), dtype=np.uint8)))
    return {
        "text": b"hello",
        "nothing": b"",
        "half": whole[: len(whole) // 2],
        "flipped": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "bomb": claiming(20_000),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
        "float": encoded(Image.new("F", (8, 8), 0.5), "TIFF"),
        "unusual": encoded(Image.new("RGB", (8, 8)), "PCX"),  # Pillow knows it, but it is not on our list
    }


@pytest.mark.parametrize("memory_gb", [0.0, 4.0])
@pytest.mark.parametrize("kind", ["text", "nothing", "half", "flipped", "bomb", "postscript", "float", "unusual"])
def test_image_folder_names_a_broken_file_and_the_fix(tmp_path, kind, memory_gb):
    root = write(tmp_path, {"ok.png": picture(), "bad.png": broken_files()[kind]})
    with pytest.raises(InputError, match=r"'bad\.png' in .* can't be decoded.*dataset\.skip_broken=true") as caught:
        everything(folder(root, memory_gb=memory_gb))
    assert "object at 0x" not in str(caught.value)


def test_decode_refuses_a_bomb_that_pillow_only_warns_of():
    with pytest.raises(ValueError, match="10000x10000 pixels are more than 89.48 million"):
        decoded(claiming(10_000))


def test_image_folder_skips_broken_files_and_counts_them(tmp_path):
    files = {"a/1.png": b"bad", "a/2.png": picture(RED), "b/1.png": picture(BLUE), "b/2.png": b"bad"}
    dataset = folder(write(tmp_path, files), skip_broken=True, conditional=True)
    assert dataset.notes[-1].startswith("left out 2 of 4 images that can't be decoded, as 'a/1.png'")
    assert colors(dataset) == [RED, BLUE] and everything(dataset)[1].tolist() == [0, 1]


def test_lazy_image_folder_puts_the_next_image_and_its_label_for_a_broken_one(tmp_path, capsys):
    files = {"a/1.png": b"bad", "a/2.png": b"bad", "b/1.png": picture(BLUE), "b/2.png": b"bad"}
    dataset = folder(write(tmp_path, files), skip_broken=True, conditional=True, memory_gb=0.0)
    assert colors(dataset) == [BLUE] * 4
    shown = capsys.readouterr().err.splitlines()
    assert sorted(line.split("'")[1] for line in shown) == ["a/1.png", "a/2.png", "b/2.png"]
    assert everything(dataset)[1].tolist() == [1] * 4
    assert capsys.readouterr().err == "", "a file is reported once"


@pytest.mark.parametrize("memory_gb", [0.0, 4.0])
def test_image_folder_of_broken_files_only_is_an_input_error(tmp_path, memory_gb):
    root = write(tmp_path, {"1.png": b"bad", "2.png": b"bad"})
    with pytest.raises(InputError, match="can be decoded|in a row can't be decoded"):
        everything(folder(root, skip_broken=True, memory_gb=memory_gb))


def test_image_folder_explains_a_root_without_images(tmp_path):
    with pytest.raises(InputError, match="no such data"):
        folder(tmp_path / "none")
    with pytest.raises(InputError, match="no images found"):
        folder(tmp_path)
    with pytest.raises(InputError, match="no images found"):
        folder(zipped(tmp_path / "empty.zip", {"readme.txt": b"no images"}))
    write(tmp_path, {"text.zip": b"hello"})
    with pytest.raises(InputError, match="not a zip"):
        folder(tmp_path / "text.zip")
    whole = Path(zipped(tmp_path / "whole.zip", {"1.png": picture()})).read_bytes()
    write(tmp_path, {"cut.zip": whole[:-30]})
    with pytest.raises(InputError, match="not a zip"):
        folder(tmp_path / "cut.zip")


def test_image_folder_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        folder(tmp_path)


def test_image_folder_reports_a_dangling_link(tmp_path):
    write(tmp_path, {"ok.png": picture()})
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="'gone.png'.*FileNotFoundError"):
        folder(tmp_path)


def test_image_folder_writes_no_member_of_a_zip_to_disk(tmp_path):
    names = ["../evil.png", "/abs.png", "a/1.png"]
    root = zipped(tmp_path / "x.zip", {name: picture() for name in names})
    assert len(folder(root)) == 2  # the path that climbs out is not even read
    assert [path.name for path in tmp_path.rglob("*")] == ["x.zip"] and not (tmp_path.parent / "evil.png").exists()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_image_folder_refuses_a_file_that_is_too_large_unread(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("cm_train.data.image_files._MAX_BYTES", 1000)
    files = {"big.png": bytes(1001)}
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: pytest.fail("read"))
    monkeypatch.setattr("zipfile.ZipFile.read", lambda self, info: pytest.fail("read"))
    with pytest.raises(InputError, match="1001 bytes are more than 1000"):
        folder(zipped(tmp_path / "x.zip", files) if kind == "zip" else write(tmp_path, files))


def test_image_folder_inflates_no_more_than_a_zip_declares(tmp_path):
    path = Path(zipped(tmp_path / "x.zip", {"1.png": bytes(10_000_000)}, compression=zipfile.ZIP_DEFLATED))
    real, lie = (10_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    assert path.read_bytes().count(real) == 2
    path.write_bytes(path.read_bytes().replace(real, lie))
    with pytest.raises(InputError, match="BadZipFile: Bad CRC-32"):
        folder(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_image_folder_refuses_compression_that_can_not_be_bounded(tmp_path, compression):
    with pytest.raises(InputError, match="compressed in another way"):
        folder(zipped(tmp_path / "x.zip", {"1.png": picture()}, compression=compression))


def test_image_folder_reads_a_zip_with_backslashes_and_duplicates(tmp_path):
    path = tmp_path / "x.zip"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the duplicate
        with zipfile.ZipFile(path, "w") as archive:
            for name, color in [("a\\1.png", RED), ("b\\1.png", BLUE), ("b\\1.png", GREEN)]:
                archive.writestr(name, picture(color))
    dataset = folder(path, conditional=True)
    assert dataset.class_names == ["a", "b"] and colors(dataset) == [RED, GREEN]
    assert dataset.notes == ["members whose names come again are left out, the last is taken: 1"]


@pytest.mark.parametrize("values", [{"channels": 2}, {"image_size": 0}, {"background": 256}, {"memory_gb": -1.0}])
def test_image_folder_settings_have_bounds(tmp_path, values):
    with pytest.raises(InputError, match=f"dataset.{next(iter(values))}"):
        folder(tmp_path, **values)
