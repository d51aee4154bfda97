"""Files of weights, whichever tool wrote them, as named tensors: nothing in them is run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...core.errors import InputError
from ...core.files import may_pass, unreadable
from ...core.settings import excerpt
from ..checkpoints import state_file
from .base import Source
from .pickles import Inert, read_pickle, tensors_of

# Where training tools keep a network in what they save, the average that one samples with first.
_INSIDE = ("ema", "model_ema", "net_ema", "state_dict", "model", "net")
_WRAPPERS = ("module.", "_orig_mod.")  # by which torch's data-parallel wrapper and its compiler go before each name


def read_source(file: Path) -> Source:
    """The tensors of a .pt or .pth, .pkl or .safetensors file, on the CPU.

    Raises:
        InputError: it is none of these, holds more than a network, or can't be read.
    """
    try:
        with open(file, "rb") as opened:
            start = opened.read(9)
        if start[:2] == b"PK":
            return _of_state(file, state_file.read(file))
        if start[:1] == b"\x80":
            return _of_pickle(file)
        if start[8:] == b"{":
            with safe_open(file, "pt") as stored:
                return Source(file.name, _plain_names({name: stored.get_tensor(name) for name in stored.keys()}))  # noqa: SIM118
    except InputError:
        raise
    except Exception as error:  # torch and safetensors raise a dozen types on what is damaged
        if may_pass(error):
            raise unreadable(file, error) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, SafetensorError):
            reason = f"{reason}: was it downloaded whole?"
        raise InputError(f"{file} is no file of weights that can be read safely", excerpt(reason)) from None
    raise InputError(
        f"{file} is no file of weights", allowed=".pt, .pth, .pkl, .safetensors", fix="was it downloaded whole?"
    )


def _of_state(file: Path, state: Mapping[str, Any]) -> Source:
    for name in _INSIDE:
        inner = state.get(name)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            state = inner
            break
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return Source(file.name, _plain_names(tensors))


def _of_pickle(file: Path) -> Source:
    """NVIDIA's snapshots: a dict with the network that one samples with under "ema"."""
    found = read_pickle(file)
    if isinstance(found, Mapping):
        found = next((found[name] for name in _INSIDE if name in found), found)
    if isinstance(found, Mapping):
        return _of_state(file, found)
    if not isinstance(found, Inert):
        raise ValueError(f"it holds a {type(found).__name__}")
    plain = {name: value for name, value in vars(found).items() if isinstance(value, int | float | str)}
    return Source(file.name, _plain_names(tensors_of(found)), found.class_name, plain)


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without those of what was wrapped around all of the network."""
    names = dict(tensors)
    while prefix := next((p for p in _WRAPPERS if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): value for name, value in names.items()}
    return names
