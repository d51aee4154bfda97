"""Pickles of networks, read without running what they say: tensors, plain attributes, and names of classes.

A pickle is a program. This reader knows the few calls by which a network's parts are put together, makes inert objects
in the place of all classes, and refuses everything else; no module that a file names is imported.
"""

import collections
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.settings import excerpt

_MOST_DEPTH = 100  # of modules within modules


class Inert:
    """Stands for an object of any class: its arguments and attributes, and no behaviour."""

    class_name = ""

    def __new__(cls, *_: object, **__: object) -> "Inert":
        """Takes what the class would have been made of, and forgets it."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object):
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update({str(key): value for key, value in state.items()})


class _Attributes(dict[Any, Any]):
    """NVIDIA's dict whose keys are attributes too."""


def read_pickle(file: Path) -> Any:
    """What a pickle holds, with `Inert` objects for those of its classes.

    Raises:
        ValueError: it wants more than a network is made of, or it is none.
        OSError: the file can't be read.
    """
    with open(file, "rb") as opened:
        try:
            return _Reader(opened).load()
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what is no pickle makes the reader raise nearly anything
            reason = str(error) or type(error).__name__
            raise ValueError(excerpt(reason.splitlines()[0])) from None


def tensors_of(network: Inert) -> dict[str, Tensor]:
    """A network's weights and buffers by their names, as its state dict has them. Raises ValueError."""
    found: dict[str, Tensor] = {}

    def walk(module: Inert, prefix: str, depth: int) -> None:
        if depth > _MOST_DEPTH:
            raise ValueError("its modules are nested too deeply")
        parts = vars(module)
        for kind in ("_parameters", "_buffers"):
            for name, value in _items(parts.get(kind)):
                if isinstance(value, Tensor):
                    found[f"{prefix}{name}"] = value
        for name, child in _items(parts.get("_modules")):
            if isinstance(child, Inert):
                walk(child, f"{prefix}{name}.", depth + 1)

    walk(network, "", 0)
    return found


def _items(mapping: object) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in mapping.items()] if isinstance(mapping, Mapping) else []


class _Reader(pickle.Unpickler):
    """Calls nothing but what is below."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        is_layer = module.split(".")[:2] == ["torch", "nn"] and name[:1].isupper()
        if is_layer or (module, name) in _INERT:
            return type(name, (Inert,), {"class_name": name})
        raise ValueError(f"it names {module}.{name}, which no network is made of")

    def persistent_load(self, pid: object) -> Any:
        raise ValueError("it refers to something outside of it")


def _persistent_object(meta: object) -> Inert:
    """NVIDIA's classes, which bring their own source code: that is left alone."""
    if not isinstance(meta, Mapping):
        raise ValueError("an object of it is described by no mapping")
    made = Inert()
    made.__setstate__(meta.get("state"))
    made.class_name = str(meta.get("class_name", ""))
    return made


def _numbers(content: bytes) -> Tensor:
    """A storage by its own bytes, which are a pickle again: of numbers, and of nothing else; flat."""
    if content[:2] == b"PK":
        raise ValueError("it holds an archive")
    stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(stored, torch.TypedStorage):
        raise ValueError(f"it holds a {type(stored).__name__} in the place of numbers")
    flat = torch.empty(0, dtype=stored.dtype).set_(stored)  # type: ignore[arg-type]
    if flat.nbytes > len(content):
        raise ValueError("its numbers are more than its bytes")
    return flat


def _tensor(flat: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """Numbers in a shape. Nothing is stretched: a tensor of stride 0 is as large as it likes."""
    if not isinstance(flat, Tensor):
        raise ValueError("a tensor of it has no numbers")
    tensor = torch.as_strided(flat, size, stride, offset)
    if tensor.numel() > flat.numel():
        raise ValueError("a tensor of it is larger than its numbers")
    return tensor


def _same(value: object, *_: object) -> object:
    return value


_CALLS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("dnnlib.util", "EasyDict"): _Attributes,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("torch.storage", "_load_from_bytes"): _numbers,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
}
# Attributes of networks that nothing is read from.
_INERT = {
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    ("torch", "device"),
}
