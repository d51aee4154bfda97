"""CIFAR's batches against numpy's own reading of the same pickles, and what hostile ones come to: an error, unrun."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest

from cm_train.data import cifar_batches

ROWS = 4
PIXELS = np.random.default_rng(0).integers(256, size=(ROWS, 3072), dtype=np.uint8)
LABELS = [3, 0, 9, 1]


def numpys(pixels=PIXELS, labels=LABELS, protocol=2, **more):
    return pickle.dumps({"data": pixels, "labels": labels, **more}, protocol=protocol)


def with_module(content, name):
    """A pickle of protocol 2 as another version of numpy writes it."""
    assert content.count(b"cnumpy._core.multiarray\n") + content.count(b"cnumpy.core.multiarray\n") == 1
    return content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", b"numpy." + name + b".")


def text(value):
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<I", len(value)) + value


def python2s(pixels=PIXELS, labels=LABELS):
    """Instruction by instruction as in the published batches, which a cPickle of Python 2 wrote."""
    shape = b"".join(b"M" + struct.pack("<H", n) for n in pixels.shape)
    return b"".join(
        [
            b"\x80\x02}q\x01(" + text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5") + b"q\x03",
            text(b"labels") + b"q\x04]q\x05(" + b"".join(b"K" + bytes([n]) for n in labels) + b"e",
            text(b"data") + b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85",
            text(b"b") + b"\x87Rq\x09(K\x01" + shape + b"\x86cnumpy\ndtype\nq\x0a" + text(b"u1") + b"K\x00K\x01\x87R",
            b"q\x0b(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            text(pixels.tobytes()) + b"tb" + text(b"filenames") + b"q\x0c]q\x0d(",
            b"".join(text(b"file_%d.png" % i) for i in range(len(pixels))) + b"eu.",
        ]
    )


GOOD = {
    "python 2": python2s(),
    "old numpy": with_module(numpys(), b"core"),
    "new numpy": with_module(numpys(), b"_core"),
    "python 3": numpys(protocol=4),
    "by columns": numpys(np.asfortranarray(PIXELS)),
    "by columns, python 3": numpys(np.asfortranarray(PIXELS), protocol=4),
    "bytes for keys": pickle.dumps({b"data": PIXELS, b"labels": LABELS}, protocol=2),
    "bytes for keys, python 3": pickle.dumps({b"data": PIXELS, b"labels": LABELS}, protocol=3),
    "names": numpys(filenames=[f"{i}.png" for i in range(ROWS)], note=None, batch_label=b"1", more=(), flag=True),
}


def read(folder, content, rows=ROWS):
    (folder / "batch").write_bytes(content)
    return cifar_batches.read(folder, ["batch"], rows)


@pytest.mark.parametrize("kind", GOOD)
def test_batches_are_what_unpickling_would_give(kind, tmp_path):
    if kind == "new numpy" and np.__version__.startswith("1."):
        pytest.skip("this numpy can't unpickle what a newer one has written; cm_train can")
    trusted = {
        key if isinstance(key, str) else key.decode(): value
        for key, value in pickle.loads(GOOD[kind], encoding="bytes").items()
    }
    images, labels = read(tmp_path, GOOD[kind])
    assert (trusted["data"] == PIXELS).all()
    assert (images.numpy().reshape(ROWS, 3072) == trusted["data"]).all()
    assert images.shape == (ROWS, 3, 32, 32)
    assert labels.tolist() == trusted["labels"] == LABELS


WRONG = {
    "another type": (numpys(PIXELS.astype(np.int8)), "not of bytes"),
    "floats": (numpys(PIXELS.astype(np.float32)), "not of bytes"),
    "fewer rows": (numpys(PIXELS[:3]), "not of shape"),
    "another shape": (numpys(PIXELS.reshape(ROWS, 3, 1024)), "not of shape"),
    "fewer bytes": (python2s().replace(text(PIXELS.tobytes()), text(PIXELS.tobytes()[1:])), "holds 12287 of 12288"),
    "a number for the bytes": (python2s().replace(text(PIXELS.tobytes()), b"M\x00\x30"), "a int where a str belongs"),
    "no array": (numpys(LABELS), "holds no array"),
    "no pixels": (pickle.dumps({"labels": LABELS}), "holds no array"),
    "no labels": (pickle.dumps({"data": PIXELS}, protocol=2), "no list of 4 labels"),
    "fewer labels": (numpys(labels=[0, 1, 2]), "no list of 4 labels"),
    "eleven classes": (numpys(labels=[0, 1, 2, 10]), "none of 0 to 9"),
    "a negative label": (numpys(labels=[0, 1, 2, -1]), "none of 0 to 9"),
    "truth for a label": (numpys(labels=[0, 1, 2, True]), "none of 0 to 9"),
    "a list": (pickle.dumps([1, 2]), "no dictionary"),
    "text": (b"half of it", "batch "),
    "nothing": (b"", "batch "),
    "half": (numpys()[:5000], "batch "),
    "no end": (numpys()[:-1], "batch "),
    "larger": (bytes(3_000_000), "larger than"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_batches_that_hold_anything_else_are_refused(kind, tmp_path):
    content, reason = WRONG[kind]
    with pytest.raises(ValueError, match=reason):
        read(tmp_path, content)


class Runs:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("where", ["whole", "data", "labels", "beside"])
def test_nothing_that_a_batch_names_is_run(tmp_path, where, protocol):
    mark = tmp_path / "ran"
    parts = {"data": PIXELS, "labels": LABELS, where: Runs(mark)}
    content = pickle.dumps(Runs(mark) if where == "whole" else parts, protocol=protocol)
    pickle.loads(content)
    assert mark.exists(), "it would do harm"
    mark.unlink()
    with pytest.raises(ValueError, match="^batch "):
        read(tmp_path, content)
    assert not mark.exists()


def test_a_function_that_a_batch_names_is_named(tmp_path):
    with pytest.raises(ValueError, match="asks for posix.system, which it doesn't need"):
        read(tmp_path, pickle.dumps(Runs("x"), protocol=4))


NESTED = b")" + b"".join(bytes([ord("q"), i, ord("h"), i, 0x86]) for i in range(60))  # each holds the last one twice
HOSTILE = {
    "a key that takes for ever": b"\x80\x02}" + NESTED + b"K\x00s.",
    "a shape that takes for ever": python2s().replace(b"(K\x01M\x04\x00M\x00\x0c\x86", b"(K\x01" + NESTED),
    "a memo of 64 GB": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a million lists": b"\x80\x02" + b"]" * 1_000_000 + b".",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "an empty stack": b"\x80\x02R.",
    "a stack too short": b"\x80\x02K\x01\x87.",
    "no mark": b"\x80\x02]e.",
    "an unknown memory": b"\x80\x02h\x07.",
    "encode nothing": b"\x80\x02}c_codecs\nencode\n)RK\x01s.",
    "a state of a dictionary": b"\x80\x02}}b.",
    "a number called": b"\x80\x02K\x01)R.",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "half a pair": b"\x80\x02}(U\x01au.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_batches_are_refused_in_little_memory(kind):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):  # noqa: PT011 - of any words
            cifar_batches.read_batch(HOSTILE[kind], ROWS)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def packed(members):
    """A tar.gz: members in any order, by path."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_archive_is_read_in_the_order_of_its_batches(tmp_path):
    second = numpys(255 - PIXELS, [5, 5, 5, 5])
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(packed([("./b/two", second), ("./b/readme.html", b"text"), ("./b/one", numpys())]))
    images, labels = cifar_batches.read(path, ["one", "two"], ROWS)
    assert (images.numpy().reshape(8, 3072) == np.concatenate([PIXELS, 255 - PIXELS])).all()
    assert labels.tolist() == [*LABELS, 5, 5, 5, 5]
    with pytest.raises(ValueError, match="three is missing"):
        cifar_batches.read(path, ["one", "two", "three"], ROWS)


ARCHIVE = packed([("b/one", numpys())])
TAR = gzip.decompress(ARCHIVE)


def bit_flipped():
    stored = gzip.compress(TAR, 0)
    return stored[:-1000] + bytes([stored[-1000] ^ 1]) + stored[-999:]


def endless_header():
    header = tarfile.TarInfo("b/one")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    return gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(10**8))


def linked():
    link = tarfile.TarInfo("b/one")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return gzip.compress(link.tobuf() + bytes(1024))


DAMAGED = {  # made where they are needed: some are large
    "no gzip": (lambda: b"half of it", "Not a gzipped file"),
    "no tar": (lambda: gzip.compress(b"half of it" * 100), "invalid header"),
    "half": (lambda: ARCHIVE[: len(ARCHIVE) // 2], "ended before"),
    "another bit": (bit_flipped, "CRC"),
    "a bomb beside": (
        lambda: packed([("b/bomb", bytes(100_000_000)), ("b/one", numpys())]),
        "more than such an archive",
    ),
    "a bomb of many": (lambda: packed([("b/x", bytes(1_000_000))] * 60), "unpacks to more than"),
    "a bomb after the end": (lambda: gzip.compress(TAR + bytes(100_000_000)), "unpacks to more than"),
    "a header without end": (endless_header, "unpacks to more than"),
    "a thousand files": (lambda: packed([(f"b/{i}", b"") for i in range(1000)]), "more than such an archive"),
    "a link": (linked, "one is missing"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_archives_are_refused_in_little_memory(kind, tmp_path):
    make, reason = DAMAGED[kind]
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(Exception, match=reason):
            cifar_batches.read(path, ["one"], ROWS)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
