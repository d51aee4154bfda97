"""A stranger's checkpoint, config, image or zip gives a valid result or an InputError.

Never another exception, never code that runs, never a write elsewhere, never memory or time without bound. What once
broke a reader stays here as an explicit example.
"""

import copy
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import subprocess
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, features
from test_checkpoints import CONFIG, network, write

from cm_train import generate
from cm_train.core.errors import InputError
from cm_train.core.settings import MAX_EXACT, typed
from cm_train.data.datasets.image_folder import ImageFolder
from cm_train.data.decoding import decode, prepare
from cm_train.models.checkpoints import find
from cm_train.models.checkpoints import load as loading
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints.manifest import DamagedCheckpoint, signed
from cm_train.models.checkpoints.verify import sha256_of
from cm_train.models.checkpoints.weights import WeightsFile
from cm_train.runs import config
from cm_train.runs.same_run import check_same_run
from cm_train.runs.stored import store_config, stored_config
from cm_train.training.config import RunConfig, dump

_TIME_S, _MEMORY = 60, 2 << 30
FEW, MANY = 0.5, 20
tiers = pytest.mark.parametrize(
    "depth", [pytest.param(FEW, id="quick"), pytest.param(MANY, id="deep", marks=pytest.mark.long)]
)


class TookTooLong(BaseException):
    """Not an Exception, which readers of broken files swallow."""


def _ring(*_: object) -> None:
    raise TookTooLong


@contextmanager
def bounded() -> Iterator[None]:
    """What runs inside may take _TIME_S, and _MEMORY more than the process holds already."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        held = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, _TIME_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(holds: Callable[[], None], examples: int, depth: float) -> None:
    """Run a property: the same examples at every quick run, many more and other ones at a deep run."""
    settings(
        max_examples=max(1, int(examples * depth)),
        derandomize=depth == FEW,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(holds)()


def or_input_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns, or None where it raised InputError of one short line."""
    try:
        with bounded():
            return function(*args, **kwargs)
    except InputError as error:
        text = str(error)
    assert len(text.splitlines()) == 1 and len(text) < 10_000
    return None


# ---------------------------------------------------------------------------------------------------- harmed bytes

Edit = tuple[str, int, bytes]
_SIZES = [struct.pack("<Q", n) for n in (0, 1, 2**16, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)]
# Hypothesis likes small numbers; a multiplier spreads them.
_anywhere = st.integers(0, (1 << 20) - 1).map(lambda n: n * 0x9E3779B1 % (1 << 20))
_positions = st.integers(0, 63) | st.integers(-100, -1) | _anywhere | _anywhere
_payloads = (
    st.binary(min_size=1, max_size=12)
    | st.sampled_from([*_SIZES, *(size[:4] for size in _SIZES), b"\xff", b"\0"])
    | st.sampled_from([b"0", b"9", b"-", b"e9", b'"', b",", b"[]", b"{}", b" ", b"\n", b"\1", b"\2"])
)
# Those that keep the length come first and more often: most files survive them further.
_kinds = st.sampled_from(["flip", "overwrite"]) | st.sampled_from(
    ["flip", "overwrite", "copy", "insert", "remove", "cut", "extend", "repeat"]
)
_edit = st.tuples(_kinds, _positions, _payloads)
edits = _edit.map(lambda edit: [edit]) | st.lists(_edit, min_size=1, max_size=4)


def harmed(data: bytes, changes: list[Edit]) -> bytes:
    for kind, position, payload in changes:
        at = position % max(len(data), 1)
        n = len(payload)
        if kind == "overwrite":
            data = data[:at] + payload + data[at + n :]
        elif kind == "flip":
            data = data[:at] + bytes([data[at] ^ (payload[0] or 1)]) + data[at + 1 :] if data else data
        elif kind == "insert":
            data = data[:at] + payload + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + 8 * n :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "extend":
            data = data + payload
        elif kind == "copy":  # a piece from elsewhere
            source = (at * 31 + payload[0]) % max(len(data), 1)
            data = data[:at] + data[source : source + 8 * n] + data[at + 8 * n :]
        elif kind == "repeat":
            data = data[:at] + 3 * data[at : at + 8 * n] + data[at + 8 * n :]
    return data


# ---------------------------------------------------------------------------------------------------- harmed trees

NESTED: Any = 0
for _ in range(100):
    NESTED = [NESTED]

_nasty = (
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 3, 4096, 16384, 2**31, 2**63, 2**64, 10**400, -(10**400), 10**4000]
    )
    | st.sampled_from([0.0, -0.0, 0.5, -1.5, 1e-9, 1e9, 1e308, -1e308, 5e-324, float("inf"), float("nan")])
    | st.sampled_from(["", "x" * 5000, "\x00", "\ud800", "../../x", "a" * 300, "~nobody/x", "1e5", "\n", "\x1b[2J"])
    | st.sampled_from([[], {}, [[]], [None], {"": None}, {"name": "os.system"}, NESTED])
)
_leaves = _nasty | st.integers(-10, 200) | st.floats() | st.text(max_size=8)
_keys = st.text(max_size=6) | st.sampled_from(["name", "_target_", "x" * 5000])
trees = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=3), max_leaves=6
)
_operations = st.sampled_from(["nudge", "replace"]) | st.sampled_from(["nudge", "replace", "delete", "add", "copy"])


def _tree_edits(values: st.SearchStrategy) -> st.SearchStrategy:
    edit = st.tuples(_operations, _anywhere, values)
    return edit.map(lambda edit: [edit]) | st.lists(edit, min_size=1, max_size=3)


tree_edits = _tree_edits(trees)


def _paths(tree: Any, path: tuple = ()) -> list[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [p for key, value in items for p in [(*path, key), *_paths(value, (*path, key))]] if len(path) < 8 else []


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _nudged(node: Any, number: int) -> Any:
    """Another value of the same type, near enough to be taken for one."""
    if isinstance(node, bool):
        return not node
    if isinstance(node, int):
        return node + (-2, -1, 1, 2, 8, node, 10 * node)[number % 7]
    if isinstance(node, float):
        return node * (0.0, 0.1, 0.5, 2.0, 10.0, 1e6, 1e-6)[number % 7]
    if isinstance(node, list):
        return (node[:-1], node + node, node[::-1])[number % 3]
    return None


def altered(tree: dict[str, Any], changes: list[tuple[str, int, Any]]) -> dict[str, Any]:
    """A copy of a tree with nodes nudged, replaced, deleted, added, or taken from elsewhere in it."""
    tree = copy.deepcopy(tree)
    for operation, number, drawn in changes:
        paths, value = _paths(tree), copy.deepcopy(drawn)
        if not paths:
            break
        path = paths[number % len(paths)]
        parent, node = _at(tree, path[:-1]), _at(tree, path)
        if operation == "nudge":
            parent[path[-1]] = _nudged(node, number // len(paths))
        elif operation == "delete":
            del parent[path[-1]]
        elif operation == "add" and isinstance(node, dict):
            node[f"new{number}"] = value
        elif operation == "copy":
            parent[path[-1]] = copy.deepcopy(_at(tree, paths[(number * 7 + 3) % len(paths)]))
        else:
            parent[path[-1]] = value
    return tree


def with_value(tree: dict[str, Any], path: str, value: Any) -> list[tuple[str, int, Any]]:
    """The edit that puts `value` at a dotted path."""
    return [("replace", [".".join(map(str, p)) for p in _paths(tree)].index(path), value)]


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A checkpoint that nobody changes."""
    return write(tmp_path_factory.mktemp("good"), 1, nested={"a": torch.arange(3.0)}, number=2, text="x")


class Copy:
    """A checkpoint in a folder of its own that can be harmed and mended."""

    def __init__(self, good: Path, run: Path):
        self.folder = checkpoint.step_folder(run, 1)
        self.folder.mkdir(parents=True)
        self.files = {p.name: p.read_bytes() for p in good.iterdir()}
        self.manifest = json.loads(self.files["manifest.json"])

    def put(self, changed: dict[str, bytes], sign: bool) -> None:
        """All files as they were but for those given; `sign`: the manifest says what the changed ones are."""
        files, manifest = self.files | changed, copy.deepcopy(self.manifest)
        for name in [*changed] if sign else []:
            file = self.folder / name
            file.write_bytes(changed[name])
            manifest["files"][name] = {"sha256": sha256_of(file), "size": len(changed[name])}
            files["manifest.json"] = signed(manifest).encode()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)


@pytest.fixture
def victim(good, tmp_path) -> Copy:
    return Copy(good, tmp_path / "run")


def use(folder: Path, weights: str = "ema") -> Any:
    """What cm-sample does with a checkpoint."""
    denoiser = loading.load_denoiser(folder, weights)
    if denoiser.config.image_size <= 64:
        for sampler in ("multistep", "heun"):
            images = generate(denoiser, [0], sampler=sampler, steps=2)
            assert images.dtype == torch.uint8 and images.shape[-1] == denoiser.config.image_size
    return denoiser


_names = st.sampled_from(["denoiser.safetensors", "ema_0.9.safetensors", "state.pt"])


@tiers
def test_checkpoint_with_harmed_bytes_is_damaged(depth, victim):
    @given(_names, edits)
    @example("state.pt", [("extend", 0, b"\0")])
    @example("ema_0.9.safetensors", [("flip", -1, b"\x80")])
    def holds(name, changes):
        content = harmed(victim.files[name], changes)
        assume(content != victim.files[name])
        victim.put({name: content}, sign=False)
        with pytest.raises(DamagedCheckpoint, match=name), bounded():
            checkpoint.verify(victim.folder)
        with pytest.raises(DamagedCheckpoint), bounded():
            find.resolve(victim.folder.parent.parent)

    check(holds, 80, depth)


def _header(names: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(names).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@tiers
def test_weights_of_a_signed_but_harmed_checkpoint_load_or_are_refused(depth, victim):
    module, file = network(0), "ema_0.9.safetensors"

    start = 8 + struct.unpack("<Q", victim.files[file][:8])[0]
    header, data = json.loads(victim.files[file][8:start]), victim.files[file][start:]

    @given(
        edits.map(lambda changes: harmed(victim.files[file], changes))
        | _edit.map(lambda change: harmed(victim.files[file], [change]))
        | tree_edits.map(lambda changes: _header(altered(header, changes), data))
    )
    @example(b"")
    @example(victim.files[file][:4])
    def holds(content):
        refuses_or_loads(content)

    def refuses_or_loads(content):
        victim.put({file: content}, sign=True)
        or_input_error(use, victim.folder)
        or_input_error(lambda: WeightsFile(victim.folder / file).check_fits(module))

    check(holds, 100, depth)
    for size in _SIZES:
        refuses_or_loads(harmed(victim.files[file], [("overwrite", 0, size)]))
    for names in (
        {},
        [],
        {"__metadata__": {"a": "b"}},
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
        {"x" * 100_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}},
        {"x": NESTED},
    ):
        refuses_or_loads(_header(names, b"\0"))
        refuses_or_loads(_header(names))


def _json(values: Any) -> bytes:
    return (signed(values) if isinstance(values, dict) else json.dumps(values)).encode()


@tiers
def test_manifest_of_a_stranger_gives_a_denoiser_or_is_refused(depth, victim):
    m = victim.manifest
    file = m["files"]["state.pt"]

    @given(tree_edits)
    @example(with_value(m, "files", {"a" * 300: file}))
    @example(with_value(m, "files", {"a\0b": file}))
    @example(with_value(m, "files", {"../../secret": file}))
    @example(with_value(m, "files.state.pt.size", 10**4000))
    @example(with_value(m, "format", NESTED))
    @example(with_value(m, "format", 10**4000))
    @example(with_value(m, "step", 10**4000))
    @example(with_value(m, "step", -1))
    @example(with_value(m, "backbone.name", NESTED))
    @example(with_value(m, "backbone", {"x" * 300_000: 1, "name": "unet"}))
    @example(with_value(m, "backbone.channels", "x y-" * 100_000))
    @example(with_value(m, "denoiser.sampling.points", {"2": [""] * 100_000}))
    @example(with_value(m, "denoiser.sampling.points", {"2": []}))
    @example(with_value(m, "denoiser.sampling.points", {"2": [80, 1, 0.5]}))
    @example(with_value(m, "denoiser.sampling.points", {"2": [1e-5, 1e-6]}))
    @example(with_value(m, "denoiser.sampling.points", {"2": [1e308, 1.0]}))
    @example(with_value(m, "denoiser.sampling.points", {"9" * 4000: []}))
    @example(with_value(m, "denoiser.sampling.num_scales", 1_000_000))
    @example(with_value(m, "denoiser.rho", 1e-3))
    @example(with_value(m, "denoiser.rho", 1e300))
    @example(with_value(m, "denoiser.sigma_max", 1e308))
    @example(with_value(m, "denoiser.sigma_max", 1e-4))
    @example(with_value(m, "denoiser.sigma_data", 5e-324))
    @example(with_value(m, "denoiser.image_size", 3))
    @example(with_value(m, "backbone.channel_mult", [1] * 12))
    @example(with_value(m, "backbone.group_channels", 3))
    def holds(changes):
        values = altered(m, changes)
        victim.put({"manifest.json": _json(values)}, sign=False)
        for weights in ("ema", "raw"):
            or_input_error(use, victim.folder, weights)
        newest = or_input_error(checkpoint.newest_manifest, victim.folder.parent.parent)
        assert newest is None or 0 <= newest.step <= MAX_EXACT

    check(holds, 250, depth)


@tiers
def test_manifest_of_harmed_bytes_gives_a_denoiser_or_is_refused(depth, victim):
    @given(edits)
    @example([("cut", 0, b"\0"), ("extend", 0, b"[" * 200_000)])
    @example([("cut", 0, b"\0"), ("extend", 0, b'{"format": ' + b"[" * 880 + b"]" * 880 + b"}")])
    @example([("cut", 0, b"\0"), ("extend", 0, b'{"format": ' + b"9" * 10_000 + b"}")])
    @example([("cut", 0, b"\0"), ("extend", 0, b'{"format": 1, "x": "' + b"x" * (2 << 20) + b'"}')])
    def holds(changes):
        victim.put({"manifest.json": harmed(victim.files["manifest.json"], changes)}, sign=False)
        or_input_error(use, victim.folder)

    check(holds, 150, depth)
    many = json.dumps(m := victim.manifest).encode().replace(b"[80.0, 0.8]", b"[" + b'"",' * 4_000_000 + b'""]')
    assert m["denoiser"]["sampling"]["points"]["2"] == [80.0, 0.8]
    victim.put({"manifest.json": many}, sign=False)
    with bounded(), pytest.raises(DamagedCheckpoint, match="can't be read: larger than"):
        checkpoint.verify(victim.folder)  # each of these errors would take a KiB


@pytest.mark.parametrize(
    ("backbone", "denoiser"),
    [
        ({"channels": 16384}, {}),
        ({"channel_mult": [1024, 1024]}, {}),
        ({"channels": 16384, "channel_mult": [1024] * 12, "group_channels": None}, {"image_size": 4096}),
        ({}, {"num_classes": 10_000_000}),
        ({}, {"image_channels": 4096}),
        # These have the weights that the file holds, whatever the image size.
        ({"dropout": 0.5}, {"image_size": 4096}),
        ({"dropout": 0.5, "attention_resolutions": []}, {"image_size": 4096}),
    ],
)
def test_network_that_the_file_does_not_hold_takes_no_memory(backbone, denoiser, victim):
    values = copy.deepcopy(victim.manifest)
    values["backbone"] |= backbone
    values["denoiser"] |= denoiser
    victim.put({"manifest.json": _json(values)}, sign=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = or_input_error(use, victim.folder)
    assert loaded is None or all(t.numel() < 10_000 for t in loaded.buffers())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000, "in KiB"


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "link outside"])
@pytest.mark.parametrize("name", ["manifest.json", "state.pt", "ema_0.9.safetensors", "unlisted.safetensors"])
def test_checkpoint_of_other_things_than_files_is_damaged(name, kind, victim, tmp_path):
    victim.put({}, sign=False)
    path = victim.folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "outside").write_bytes(b"secret")
        path.symlink_to(tmp_path / ("outside" if kind == "link outside" else "nowhere"))
    # Whoever waits for the other end of a pipe meets it at last, so that the test fails instead of hanging.
    meet = 'while sleep 20; do [ -p "$0" ] && exec 3<> "$0" && exec 3>&-; done'
    began = time.monotonic()
    with subprocess.Popen(["sh", "-c", meet, path]) as other_end:
        try:
            with pytest.raises(DamagedCheckpoint):
                checkpoint.verify(victim.folder)
            assert or_input_error(find.resolve, victim.folder) is None
            if name == "state.pt":
                with pytest.raises(DamagedCheckpoint):
                    checkpoint.read_state(victim.folder)
        finally:
            other_end.kill()
    assert time.monotonic() < began + 15


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a\0b", "a" * 300, "a" * 300 + "/b", "", "\udc80"])
def test_resolve_of_an_odd_path_is_an_input_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        find.resolve(path)
    with pytest.raises(InputError):
        ImageFolder(ImageFolder.Config(root=path if path else "nowhere"))


# ---------------------------------------------------------------------------------------------------- state.pt


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _state(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Calls:
    """What pickles as a call."""

    def __init__(self, function: Callable, *args: Any):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _holding_itself() -> dict[str, Any]:
    value: dict[str, Any] = {"x": torch.zeros(1)}
    value["self"] = value
    return value


def _doubled(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


def _overlapping() -> bytes:
    """Many members that are one in the file."""
    content = bytearray(_zip({f"archive/data/{i}": bytes(1000) if i == 0 else b"" for i in range(50)}))
    first = bytes(content).index(b"PK\x01\x02")
    sizes = content[first + 16 : first + 28]  # checksum, compressed and real size
    at = first
    while (at := bytes(content).find(b"PK\x01\x02", at)) >= 0:
        content[at + 16 : at + 28] = sizes
        content[at + 42 : at + 46] = bytes(4)  # where it starts
        at += 4
    return bytes(content)


def _lying() -> bytes:
    """A compressed pickle that says to be small."""
    pickled = _members(_state({"x": "x" * 1_000_000}))["archive/data.pkl"]
    content = _zip({"archive/data.pkl": pickled}, zipfile.ZIP_DEFLATED)
    return content.replace(struct.pack("<I", len(pickled)), struct.pack("<I", 1000))


def _packed(pickled: bytes) -> bytes:
    """What torch.save writes, with another pickle inside."""
    return _zip(_members(_state({})) | {"archive/data.pkl": pickled})


STATES = {
    "code": (lambda: _state({"x": Calls(os.system, "touch owned")}), "more than numbers and tensors"),
    "code of another protocol": (lambda: _packed(pickle.dumps({"x": Calls(os.system, "touch owned")}, 4)), ""),
    "no zip": (lambda: pickle.dumps({"x": Calls(os.system, "touch owned")}), "not a zip"),
    "no dict": (lambda: _state([1, 2]), "holds a list"),
    "no pickle": (lambda: _zip({"archive/version": b"3\n"}), ""),
    "nothing": (lambda: b"", "not a zip"),
    "compressed": (_lying, "compressed"),
    "overlapping members": (_overlapping, "members are larger"),
    "a set that takes for ever": (lambda: _state({"x": Calls(set, Calls(bytearray, 10**10))}), "more than numbers"),
    "bytes without end": (lambda: _state({"x": Calls(bytearray, 10**10)}), "more than numbers"),
    "a tensor without end": (lambda: _state({"x": Calls(torch.Tensor, 100_000, 100_000)}), "more than numbers"),
    "a tensor of one number": (lambda: _state({"x": torch.zeros(1).expand(10**6, 10**6)}), "tensors are larger"),
    "two pickles": (lambda: _zip(_members(_state({})) | {"archive/DATA.PKL": pickle.dumps({}, 2)}), "ambiguous"),
}


@pytest.mark.parametrize("kind", STATES)
def test_state_of_a_stranger_is_refused_and_runs_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, reason = STATES[kind]
    (tmp_path / "state.pt").write_bytes(content())
    with bounded(), pytest.raises(DamagedCheckpoint, match=f"state.pt can't be read.*{reason}"):
        checkpoint.read_state(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("value", [{"x": torch.arange(3), "y": {"z": 1}}, {}])
def test_state_of_plain_values_is_read(value, tmp_path):
    (tmp_path / "state.pt").write_bytes(_state(value))
    with bounded():
        assert checkpoint.read_state(tmp_path).keys() == value.keys()


@pytest.mark.parametrize("value", [_holding_itself(), _doubled(60)])
def test_state_that_holds_a_container_twice_is_refused(value, tmp_path):
    (tmp_path / "state.pt").write_bytes(_state(value))
    with bounded(), pytest.raises(DamagedCheckpoint, match="the same thing twice"):
        checkpoint.read_state(tmp_path)


@tiers
def test_state_of_harmed_bytes_is_read_or_damaged(depth, victim):
    @given(st.booleans(), edits)
    @example(True, [("overwrite", 2, b"\x80")])
    def holds(inside, changes):
        content = victim.files["state.pt"]
        if inside:  # the pickle, in a zip that is sound
            members = _members(content)
            name = next(n for n in members if n.endswith("data.pkl"))
            content = _zip(members | {name: harmed(members[name], changes)})
        else:
            content = harmed(content, changes)
        (victim.folder / "state.pt").write_bytes(content)
        state = or_input_error(checkpoint.read_state, victim.folder)
        assert state is None or isinstance(state, dict)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(holds, 300, depth)


# ---------------------------------------------------------------------------------------------------- configs

_interpolations = st.sampled_from(
    ["${name}", "${seed}", "${nowhere}", "${steps}${steps}", "${.}", "${..}", "${", "$", "${}", "???", "${oc.env:HOME}"]
) | st.sampled_from(["${oc.env:NOWHERE}", "${oc.decode:'['}", "${oc.create:{a: 1}}", "${oc.dict.keys:noise}"])
_settings_values = (
    trees | _interpolations | st.binary(max_size=4) | st.just(Path("x")) | st.dictionaries(st.integers(), st.integers())
)
_settings_edits = _tree_edits(_settings_values)


@tiers
def test_parse_gives_a_config_that_can_be_stored_or_is_refused(depth, composed, tmp_path):
    trees_by_mode = [OmegaConf.to_container(composed(f"mode={mode}")) for mode in ("edm", "cd", "ict")]
    edm = trees_by_mode[0]

    @given(st.sampled_from(trees_by_mode), _settings_edits)
    @example(edm, with_value(edm, "name", "${name}"))
    @example(edm, with_value(edm, "save_every", "9" * 400 + "m"))
    @example(edm, with_value(edm, "save_every", 10**4400))
    @example(edm, with_value(edm, "save_every", 10**400))
    @example(edm, with_value(edm, "steps", 10**4400))
    @example(edm, with_value(edm, "seed", 10**4000))
    @example(edm, with_value(edm, "compile", 10**4400))
    @example(edm, with_value(edm, "optimizer.lr", 10**400))
    @example(edm, with_value(edm, "dataset.name", 10**4400))
    @example(edm, with_value(edm, "dataset", "x"))
    @example(edm, with_value(edm, "noise.rho", 0.001))
    @example(edm, with_value(edm, "noise.sigma_max", 1e308))
    @example(edm, with_value(edm, "run_dir", "~nobody-of-that-name/x"))
    @example(edm, with_value(edm, "name", "2001-01-01\x85\u2028=\ufeff\x00"))
    @example(edm, with_value(edm, "sampling.points", {2: [80.0, 0.001]}))
    @example(edm, with_value(edm, "sampling.points", {2: [0.8, 80.0]}))
    @example(edm, with_value(edm, "sampling.points", {10**4400: []}))
    def holds(tree, changes):
        try:
            cfg = OmegaConf.create(altered(tree, changes))
        except (OmegaConfBaseException, ValueError):  # the command line never gets there
            assume(False)
        parsed = or_input_error(config.parse, cfg)
        if parsed is not None:
            values = dump(parsed)
            with bounded():
                store_config(tmp_path, values)
                stored = stored_config(tmp_path)
                assert typed(RunConfig, stored) == parsed
                check_same_run(tmp_path, typed(RunConfig, stored), parsed)

    check(holds, 300, depth)


_yaml_pieces = (
    st.sampled_from(
        [
            "a",
            "b",
            ": ",
            ":",
            "- ",
            "\n",
            "\n  ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "? ",
            "&x ",
            "*x",
            "<<: ",
            "=",
            "~",
            "#",
            "%",
        ]
    )
    | st.sampled_from(
        ["!!int ", "!!float ", "!!bool ", "!!null ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ", "! "]
    )
    | st.sampled_from(
        ["!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system ", "!x ", "--- ", "...\n", "|\n "]
    )
    | st.sampled_from(
        ["1", "-", "0x", "0b", "0o7", "1_0", "1:1", ".5", ".nan", ".inf", "1e5", "yes", "2001-01-01", "2001-99-99"]
    )
    | st.sampled_from(['"', "'", "\\", "\\ud800", "\t", "\x85", "\x00", "\ufeff", "é", "9999-12-31T23:59:59-23:59"])
)
_yaml_texts = st.lists(_yaml_pieces, max_size=12).map("".join)


@tiers
def test_stored_config_of_a_stranger_is_plain_values_or_refused(depth, composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "config.yaml"
    mine = config.parse(composed())
    values = dump(mine)
    written = yaml.safe_dump(values)

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str | int | float | None) and plain(v) for k, v in value.items())
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)

    @given(
        st.binary(max_size=30)
        | _yaml_texts.map(str.encode)
        | st.tuples(st.integers(0, 99), _yaml_texts).map(lambda c: _spliced(written, *c))
        | edits.map(lambda changes: harmed(written.encode(), changes))
        | tree_edits.map(lambda changes: yaml.safe_dump(altered(values, changes)).encode())
    )
    @example(b"a: 9999-12-31T23:59:59-23:59")
    @example(b'a: !!int ""')
    @example(b"a: !!bool x")
    @example(b"a: !!timestamp x")
    @example(b"a: !!set {b}")
    @example(b"a: !!omap [b: 1]")
    @example(b"a: !!binary aGk=")
    @example(b"2001-01-01: 1")
    @example(b"? [a]\n: 1")
    @example(b"a: " + b"1:" * 300 + b"1.0")
    @example(b"a: " + b"1:" * 100_000 + b"1")
    @example(b"a: 0x" + b"f" * 100_000)
    @example(b"? 0x" + b"f" * 10_000 + b"\n: 1")
    @example(b"steps: 0x" + b"f" * 10_000)
    @example(written.encode().replace(b"\ndataset:\n", b"\ndataset:\n  deep: " + b"[" * 270 + b"]" * 270 + b"\n"))
    @example(b"[" * 100_000)
    @example(b"- " * 100_000)
    @example(b"a: &x [1]\nb: [*x, *x]")
    @example(b"a: \n" * 300_000)
    @example(b'a: "\\ud800"')
    @example(b"a: .nan")
    @example(written.encode().replace(b"seed: 0", b"seed: 0x" + b"f" * 60))
    @example(written.encode().replace(b"run_dir: ", b"run_dir: ~nobody-of-that-name/"))
    def holds(content):
        file.write_bytes(content)
        values = or_input_error(stored_config, file.parent)
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.yaml", "run"]
        if values is None:
            return
        assert plain(values)
        theirs = or_input_error(typed, RunConfig, values)
        if theirs is not None:
            or_input_error(check_same_run, file.parent, theirs, mine)
            or_input_error(check_same_run, file.parent, mine, theirs)
            assert isinstance(theirs.folder, Path)

    check(holds, 400, depth)


def _spliced(text: str, line: int, piece: str) -> bytes:
    """A YAML text with the value of one line replaced."""
    lines = text.splitlines()
    at = line % len(lines)
    lines[at] = f"{lines[at].split(':')[0]}: {piece}"
    return "\n".join(lines).encode()


# ---------------------------------------------------------------------------------------------------- images


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pictures() -> dict[str, bytes]:
    """One small file of each kind that is read."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8))
    grey16 = Image.fromarray(np.arange(54, dtype=np.uint16).reshape(6, 9) * 1200)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "png": _encoded(rgb, "PNG"),
        "palette.png": _encoded(rgb.convert("P"), "PNG", transparency=3),
        "alpha.png": _encoded(rgb.convert("RGBA"), "PNG"),
        "16bit.png": _encoded(grey16, "PNG"),
        "jpg": _encoded(rgb, "JPEG", exif=exif),
        "progressive.jpg": _encoded(rgb.convert("CMYK"), "JPEG", progressive=True),
        "gif": _encoded(rgb.convert("P"), "GIF", transparency=0),
        "webp": _encoded(rgb, "WEBP", exif=exif),
        "lossless.webp": _encoded(rgb.convert("RGBA"), "WEBP", lossless=True),
        "bmp": _encoded(rgb, "BMP"),
        "tif": _encoded(rgb, "TIFF"),
        "lzw.tif": _encoded(rgb, "TIFF", compression="tiff_lzw"),
        "16bit.tif": _encoded(grey16, "TIFF"),
        "ppm": _encoded(rgb, "PPM"),
    }
    return files | ({"avif": _encoded(rgb, "AVIF")} if features.check("avif") else {})


PICTURES = _pictures()
_pictures_harmed = st.tuples(st.sampled_from(sorted(PICTURES)), edits)


@pytest.fixture(autouse=True)
def quiet():
    """What Pillow says of broken files is no error, and nobody reads it here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@tiers
def test_decode_of_harmed_bytes_gives_an_image_or_raises(depth):
    prepare()
    warnings.filterwarnings("ignore", module=r"PIL\.")

    @given(_pictures_harmed, st.sampled_from([1, 3]), st.sampled_from([1, 8, 33]))
    @example(("png", []), 3, 8)
    @example(("ppm", [("overwrite", 3, b"9000000 1\n255\n")]), 3, 8)
    @example(("bmp", [("overwrite", 18, struct.pack("<ii", 9000, -9000))]), 3, 8)
    @example(("bmp", [("overwrite", 18, struct.pack("<ii", 0, 0))]), 3, 8)
    @example(("gif", [("overwrite", 6, b"\xff\xff\xff\xff")]), 3, 8)
    @example(("tif", [("overwrite", 4, b"\x08\0\0\0")]), 3, 8)
    def holds(picture, channels, size):
        content = harmed(PICTURES[picture[0]], picture[1])
        try:
            with bounded():
                image = decode(content, size, channels, 255)
        except Exception:  # as documented; the data set turns it into an InputError
            assert picture[1], "a file that nobody harmed"
            return
        assert image.dtype == torch.uint8 and image.shape == (channels, size, size)

    check(holds, 1000, depth)


def images_of(root: Path, **values: Any) -> torch.Tensor:
    """Every image of a data set."""
    dataset = ImageFolder(ImageFolder.Config(root=str(root), image_size=8, **values))
    images = dataset.gather(torch.arange(len(dataset)))[0]
    assert images.dtype == torch.uint8 and images.shape == (len(dataset), 3, 8, 8)
    assert re.fullmatch("images:[0-9a-f]{64}", dataset.fingerprint())
    return images


_memory = st.sampled_from([0.0, 4.0])  # decoded when asked for, or at the start


@tiers
def test_image_folder_with_a_harmed_file_works_or_is_refused(depth, tmp_path):
    bad = tmp_path / "bad.png"

    @given(_pictures_harmed, _memory, st.booleans())
    @example(("png", [("cut", 50, b"\0")]), 4.0, True)
    @example(("png", [("cut", 50, b"\0")]), 0.0, True)
    @example(("png", [("cut", 50, b"\0")]), 4.0, False)
    def holds(picture, memory_gb, alone):
        good = tmp_path / "good.png"
        good.unlink(missing_ok=True)
        if not alone:
            good.write_bytes(PICTURES["png"])
        bad.write_bytes(harmed(PICTURES[picture[0]], picture[1]))
        plain = or_input_error(images_of, tmp_path, memory_gb=memory_gb)
        skipped = or_input_error(images_of, tmp_path, memory_gb=memory_gb, skip_broken=True)
        assert alone or skipped is not None, "one image is whole"
        assert plain is None or torch.equal(plain, skipped)

    check(holds, 150, depth)


_HOSTILE_NAMES = ["../../x.png", "/abs/x.png", "a/../../x.png", "a\\..\\x.png", "C:x.png", "a/" * 200 + "x.png"]


@tiers
def test_zip_of_a_stranger_works_or_is_refused_and_writes_nothing(depth, tmp_path):
    members = dict.fromkeys([*_HOSTILE_NAMES, "a/1.png", "b/2.png"], PICTURES["png"]) | {"a/3.gif": PICTURES["gif"]}
    classes = {"cats/1.png": PICTURES["png"], "dogs/2.jpg": PICTURES["jpg"]}
    zips = [_zip(members), _zip(members, zipfile.ZIP_DEFLATED), _zip(classes), _zip({"1.png": PICTURES["png"]})]
    central = zips[3].index(b"PK\x01\x02")
    file = tmp_path / "inner" / "folder" / "x.zip"
    file.parent.mkdir(parents=True)
    before = [p.name for p in tmp_path.rglob("*")]

    @given(st.sampled_from(zips), edits, _memory, st.booleans())
    @example(zips[0], [], 4.0, False)
    @example(zips[1], [], 0.0, False)
    @example(_zip({"\udc80.png".encode("utf-8", "surrogatepass").decode("latin-1"): PICTURES["png"]}), [], 4.0, False)
    @example(_zip({"1.png": PICTURES["png"]}, zipfile.ZIP_BZIP2), [], 4.0, False)
    @example(zips[0], [("overwrite", -10, b"\xff\xff\xff\xff")], 4.0, False)
    @example(zips[0], [("overwrite", -6, b"\xff\xff\xff\xff")], 4.0, False)
    @example(zips[3], [("overwrite", central + 6, b"\xff\xff")], 4.0, False)  # of a version to come
    @example(zips[3], [("overwrite", central + 8, b"\0\x08"), ("overwrite", central + 46, b"\xff")], 4.0, False)
    def holds(content, changes, memory_gb, skip_broken):
        file.write_bytes(harmed(content, changes))
        images = or_input_error(images_of, file, memory_gb=memory_gb, skip_broken=skip_broken)
        assert images is not None or changes or memory_gb == 4.0
        or_input_error(images_of, file, memory_gb=memory_gb, conditional=True, skip_broken=True)
        assert {p.name for p in tmp_path.rglob("*")} == {*before, "x.zip"}
        assert not Path("/abs").exists()

    check(holds, 250, depth)


def test_zip_member_takes_no_more_memory_than_it_declares(tmp_path):
    """zipfile alone inflates a GiB before it looks at the size that was declared."""
    size = 100_000_000
    content = _zip({"1.png": bytes(size)}, zipfile.ZIP_DEFLATED)
    (tmp_path / "x.zip").write_bytes(content.replace(struct.pack("<I", size), struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        assert or_input_error(images_of, tmp_path / "x.zip") is None
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_readers_take_what_nobody_harmed(good, tmp_path):
    """The properties above hold for a reader that refuses everything, too."""
    assert use(good).config == CONFIG
    assert checkpoint.read_state(good)["number"] == 2
    for name, content in PICTURES.items():
        (tmp_path / f"{name.replace('.', '_')}.{name.split('.')[-1]}").write_bytes(content)
    assert len(images_of(tmp_path)) == len(PICTURES)
