"""Foreign checkpoints: each network against numbers of its own code, and files that are no checkpoint."""

import io
import json
import math
import os
import pickle
import sys
import types
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_songunet import numbers

from cm_train import load_denoiser
from cm_train.core.errors import InputError
from cm_train.models.checkpoints import find
from cm_train.models.formats.base import Source, Told, by_parts
from cm_train.models.formats.importing import import_file, imported, read_foreign
from cm_train.models.formats.pickles import Inert, read_pickle

# Made once by the public code (NVlabs/edm and edm2: their preconditioned networks; openai/consistency_models: its U-Net
# in its coefficients, with plain attention in the place of the fused one) with the weights of `made`: the names and
# shapes of its state dict, and each 13th number of its output for two images of noise levels 0.3 and 5.
REFERENCES = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "foreign").glob("*.json")}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(name, shape):
    """Weights that hang on their name alone, so that every path carries a signal of order 1."""
    value = numbers(*(shape or [1]), key=zlib.crc32(name.encode()) % 2**20).reshape(shape)
    if len(shape) > 1:
        value = value / math.sqrt(math.prod(shape[1:]))
    elif not name.endswith(("freqs", "phases")):
        value = 0.3 * value + name.endswith("weight")
    return value.float()


def state_of(name):
    """The state dict of a reference, with the filters that NVIDIA's have beside their weights."""
    known = REFERENCES[name]
    state = {key: made(key, shape) for key, shape in known["tensors"].items()}
    if known["taps"]:
        taps = torch.tensor(known["taps"], dtype=torch.float32)
        state["model.enc.4x4_down.conv0.resample_filter"] = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    return state


def told_of(name):
    return Told(**REFERENCES[name].get("told", {}))


class Module:
    """A module as NVIDIA's pickles have it: a persistent object of a class whose source they bring along."""

    def __init__(self, class_name, **attributes):
        self.class_name, self.attributes = class_name, attributes
        self.parameters, self.buffers, self.modules = {}, {}, {}

    def __reduce__(self):
        state = {"_parameters": self.parameters, "_buffers": self.buffers, "_modules": self.modules, **self.attributes}
        source = "raise SystemExit('this must not be run')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.class_name, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@pytest.fixture
def nvidia(monkeypatch):
    """NVIDIA's modules while a test writes pickles; whoever reads one must not ask for them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called while it was read")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util", "__qualname__": "EasyDict"})
    packages = [types.ModuleType(name) for name in ("torch_utils", "dnnlib")]
    for module in (*packages, persistence, util):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return util


def snapshot(state, class_name, util, half=False):
    """An NVIDIA snapshot with these tensors in a tree of modules."""
    root = Module(class_name, img_resolution=8, sigma_data=0.5, use_fp16=half)
    for name, value in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            module = module.modules.setdefault(part, Module("Layer"))
        if last in ("weight", "bias") or last.endswith("gain"):
            module.parameters[last] = torch.nn.Parameter(value.half() if half else value, requires_grad=False)
        else:
            module.buffers[last] = value
    return {"ema": root, "loss_fn": None, "dataset_kwargs": util.EasyDict(path="x", use_labels=True)}


def write_as(kind, name, path, util):
    state = state_of(name)
    if kind == "pkl":
        path.write_bytes(pickle.dumps(snapshot(state, REFERENCES[name]["class_name"], util)))
    elif kind == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()} if kind == "pth" else state
        torch.save({"ema": wrapped, "step": 7} if kind == "pth" else wrapped, path)


def outputs(denoiser, classes):
    x, sigma = numbers(2, 3, 8, 8, key=7).float(), torch.tensor([0.3, 5.0])
    return denoiser(x, sigma, torch.tensor([1, 0]) if classes else None)


KINDS = [(name, kind) for name in sorted(REFERENCES) for kind in ("pkl", "pt", "pth", "safetensors")]
KINDS = [(name, kind) for name, kind in KINDS if kind != "pkl" or REFERENCES[name]["class_name"]]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_foreign_network_computes_what_its_own_code_does(name, kind, tmp_path, nvidia, monkeypatch):
    file = tmp_path / f"{name}.{kind}"
    write_as(kind, name, file, nvidia)
    monkeypatch.delitem(sys.modules, "torch_utils.persistence")
    monkeypatch.delitem(sys.modules, "dnnlib.util")
    known = REFERENCES[name]
    format_name, found = import_file(file, tmp_path / "out", told_of(name))
    assert format_name == known["format"]
    assert found.denoiser.kind == ("consistency" if name == "openai_cd" else "diffusion")
    assert found.denoiser.boundary == ("sigma_min" if name == "openai_cd" else "zero")
    assert found.denoiser.num_classes == known["classes"] and found.denoiser.image_size == 8
    output = outputs(load_denoiser(tmp_path / "out"), known["classes"])
    torch.testing.assert_close(output.flatten()[::13], torch.tensor(known["output"]), rtol=0, atol=1e-5)


def test_weights_in_half_precision_are_computed_with_in_float32(tmp_path, nvidia):
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(snapshot(state_of("edm2"), "Precond", nvidia, half=True)))
    _, found = read_foreign(tmp_path / "edm2.pkl", Told())
    assert {value.dtype for value in found.weights.values()} == {torch.float32}


def test_the_class_in_the_file_says_which_coefficients_it_has(tmp_path, nvidia):
    file = tmp_path / "model.pkl"
    for class_name, kind in (("EDMPrecond", "diffusion"), ("ECMPrecond", "consistency")):
        file.write_bytes(pickle.dumps(snapshot(state_of("ddpmpp"), class_name, nvidia)))
        denoiser = read_foreign(file, Told())[1].denoiser
        assert (denoiser.kind, denoiser.boundary) == (kind, "zero")
    file.write_bytes(pickle.dumps(snapshot(state_of("ddpmpp"), "VPPrecond", nvidia)))
    with pytest.raises(InputError, match=r"not known here; got 'VPPrecond'; allowed: EDMPrecond, ECMPrecond"):
        read_foreign(file, Told())
    assert read_foreign(file, Told(preconditioning="edm"))[1].denoiser.kind == "diffusion"


def test_openai_s_names_say_which_coefficients_they_have(tmp_path):
    told = {key: value for key, value in REFERENCES["openai_cd"]["told"].items() if key != "preconditioning"}
    for name, kind in (("edm_x.pt", "diffusion"), ("cd_x.pt", "consistency"), ("ct_x.pt", "consistency")):
        torch.save(state_of("openai_cd"), tmp_path / name)
        assert read_foreign(tmp_path / name, Told(**told))[1].denoiser.kind == kind
    torch.save(state_of("openai_cd"), tmp_path / "x.pt")
    with pytest.raises(InputError, match="diffusion model or a consistency model; fix: cm-convert"):
        read_foreign(tmp_path / "x.pt", Told(**told))


def test_a_file_is_a_checkpoint_wherever_one_is_named_and_is_read_once(tmp_path, nvidia, monkeypatch, capsys):
    file = tmp_path / "model.pkl"
    write_as("pkl", "ncsnpp", file, nvidia)
    folder, manifest = find.resolve(file)
    assert folder == imported(file) and manifest.provenance["licence"].startswith("CC BY-NC-SA")
    assert "note: its weights are under CC BY-NC-SA" in capsys.readouterr().err
    monkeypatch.setattr("cm_train.models.formats.importing.read_source", None)
    assert find.peek(file).denoiser.image_size == 8
    assert find.resolve_known(file, manifest.files["imported.safetensors"].sha256)[0] == folder
    torch.testing.assert_close(
        outputs(load_denoiser(file), 0).flatten()[::13], torch.tensor(REFERENCES["ncsnpp"]["output"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("order", ["qkv head channel", "head qkv channel", "head channel qkv"])
def test_rows_of_queries_keys_and_values_come_into_our_order(order):
    sizes = {"qkv": 3, "head": 2, "channel": 4}
    labels = {axis: torch.arange(size) for axis, size in sizes.items()}
    grid = torch.meshgrid(*(labels[axis] for axis in order.split()), indexing="ij")
    rows = dict(zip(order.split(), (axis.flatten() for axis in grid), strict=True))
    found = by_parts(rows["qkv"] * 100 + rows["head"] * 10 + rows["channel"], order, heads=2)
    assert found.tolist() == [
        part * 100 + head * 10 + channel for part in range(3) for head in range(2) for channel in range(4)
    ]


# Files that are no checkpoint


class Runs:
    """A pickle that asks for a call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def in_a_storage(content):
    """A pickle whose only tensor is of a storage with these bytes."""
    return pickle.dumps(Runs(torch.storage._load_from_bytes, content))


def legacy(thing):
    stream = io.BytesIO()
    torch.save(thing, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def zipped(thing):
    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.getvalue()


HOSTILE = {
    "system": lambda where: pickle.dumps(Runs(os.system, f"touch {where}")),
    "eval": lambda where: pickle.dumps({"ema": Runs(eval, f"open({str(where)!r}, 'w')")}),
    "nested": lambda where: in_a_storage(legacy(Runs(os.system, f"touch {where}"))),
    "pickle in a pickle": lambda where: in_a_storage(pickle.dumps(Runs(os.system, f"touch {where}"))),
    "archive in a pickle": lambda where: in_a_storage(zipped(Runs(os.system, f"touch {where}"))),
    "module": lambda where: b"\x80\x02ctorch.hub\nload\nU\x01x\x85R.",
    "attribute of torch": lambda where: b"\x80\x02ctorch\nload\nU\x01x\x85R.",
    "persistent": lambda where: b"\x80\x02U\x01xQ.",
    "extension": lambda where: b"\x80\x02\x82\x01.",
    "bytearray": lambda where: b"\x80\x04c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "truncated": lambda where: pickle.dumps({"ema": [1, 2, 3]})[:-4],
    "nothing": lambda where: b"",
    "text": lambda where: b"<!DOCTYPE html><html>not found</html>",
    "number": lambda where: pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2),
    "numbers alone": lambda where: pickle.dumps({"ema": {"a": 1}}),
    "state with a call": lambda where: zipped({"a": Runs(os.system, f"touch {where}")}),
    "half a file": lambda where: zipped({"a": torch.zeros(1000)})[:2000],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_and_runs_nothing(name, tmp_path):
    proof, file = tmp_path / "it ran", tmp_path / "model.pkl"
    file.write_bytes(HOSTILE[name](proof))
    with pytest.raises(InputError) as caught:
        imported(file)
    assert not proof.exists() and "\n" not in str(caught.value) and "model.pkl" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_tensor_is_no_larger_than_its_numbers(tmp_path):
    """A tensor of stride 0 is as large as it likes, and one beyond its storage makes torch enlarge that."""
    numbers_of = torch.zeros(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=numbers_of, dtype=torch.float32, _internal=True)
    for size, stride in (((10**9,), (0,)), ((10**9,), (1,)), ((-1,), (1,))):
        hostile = Runs(torch._utils._rebuild_tensor_v2, typed, 0, size, stride, False, {})
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(hostile))
        with pytest.raises(ValueError, match=r".+"):
            read_pickle(tmp_path / "x.pkl")


def test_objects_of_a_pickle_are_inert(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(2, 3))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(layer))
    found = read_pickle(tmp_path / "x.pkl")
    assert isinstance(found, Inert) and type(found).__name__ == "Sequential" and not callable(found)
    assert not isinstance(found, torch.nn.Module)


@pytest.mark.parametrize("name", sorted(REFERENCES))
@pytest.mark.parametrize("shape", [(), (0,), (7, 5, 3, 3)])
def test_shapes_that_make_no_network_are_one_line(name, shape, monkeypatch, tmp_path):
    """A file's tensors say how large a network is; here one says it that does not belong to the others."""
    state = state_of(name)
    for key in [*state][math.prod(shape) % 5 :: 5]:
        source = Source("x.pt", state | {key: torch.zeros(shape)}, REFERENCES[name]["class_name"])
        monkeypatch.setattr("cm_train.models.formats.importing.read_source", lambda _, source=source: source)
        if key.startswith("logvar") or key.endswith("resample_filter") or tuple(state[key].shape) == shape:
            continue  # not needed, or as it is
        with pytest.raises(InputError, match=r"x\.pt") as caught:
            read_foreign(tmp_path / "x.pt", told_of(name))
        assert "\n" not in str(caught.value), key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.map_layer1.bias"), r"lacks the tensor model\.map_layer1\.bias; fix: was it"),
        (lambda state: state.update(extra=torch.zeros(2)), r"no place for; got '1 of them, as extra'"),
        (
            lambda state: state.update({"model.map_layer0.bias": torch.zeros(5)}),
            r"does not fit its network: embed_in\.bias; got 'shape \[5\]'; allowed: \[128\]",
        ),
        (
            lambda state: state.pop("model.map_layer0.weight"),
            r"network that is not known here; .*one of openai, edm, edm2",
        ),
        (lambda state: [state.pop(n) for n in [*state] if "8x8" in n and ".enc." in n], r"lacks|does not fit|no place"),
    ],
)
def test_a_file_of_another_network_is_one_line(change, words, tmp_path):
    state = state_of("ddpmpp")
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=words) as caught:
        imported(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)
