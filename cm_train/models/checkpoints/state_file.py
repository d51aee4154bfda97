"""state.pt of a checkpoint, read as if a stranger had written it: no code, no more memory than the file's size."""

import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.files import not_through_a_link

# All that a pickle of dicts, numbers and tensors names.
_STATE_GLOBALS = re.compile(
    r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch (?!Untyped)[A-Z]\w*Storage"
)


_GETS, _PUTS = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT")
_FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_MOST_DEPTH = 100
_LEAVES = ("GLOBAL", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")  # what may stand in many places


def read(file: Path) -> dict[str, Any]:
    """Nested dicts of tensors and numbers, on the CPU. Raises nearly anything where the file holds anything else."""
    os.close(not_through_a_link(str(file), os.O_RDONLY))  # nor a pipe, which would block for ever
    size = file.stat().st_size
    _check_archive(file, size)
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    if _num_bytes(state) > size:  # a tensor of stride 0 is as large as it likes, until somebody copies it
        raise ValueError("its tensors are larger than the file")
    return state


def _check_archive(file: Path, size: int) -> None:
    """Refuse a zip that torch.load would take more memory or time for than its size says. Raises ValueError."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [m.filename.lower() for m in members]  # torch looks them up without regard to case
        if len(set(names)) < len(names) or any(m.orig_filename != m.filename for m in members):
            raise ValueError("the names of its members are ambiguous")
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("it has compressed members")
        if sum(m.file_size for m in members) > size:
            raise ValueError("its members are larger than the file")
        for name, member in zip(names, members, strict=True):
            if name.endswith("data.pkl"):
                _check_pickle(archive.read(member))


def _check_pickle(pickled: bytes) -> None:
    """Refuse a pickle that names more than tensors, or builds more than it looks like. Raises ValueError.

    Torch also allows bytearray(10**12). A container that is used twice may hold one that is used twice, and so on:
    sixty bytes stand for a tree without end, which Python walks when it is a key of a dict. A million tuples around
    each other end the process when that walks them.
    """
    before, memo = "", dict[Any, str]()
    depths: list[int | None] = []  # of what is on the pickle's stack; None is a mark
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "GLOBAL" and not _STATE_GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"it holds more than numbers and tensors: {argument}")
        if name in ("STACK_GLOBAL", "DUP") or (name in _GETS and memo.get(argument) not in _LEAVES):
            raise ValueError("it holds the same thing twice")
        if name == "MEMOIZE" or name in _PUTS:
            memo[len(memo) if name == "MEMOIZE" else argument] = before
            continue
        before = name
        if name == "MARK":
            depths.append(None)
            continue
        taken = _taken(opcode, depths)
        if opcode.stack_after:
            # What is put into a container that is there already makes that no deeper by itself.
            inside, around = (taken[1:], taken[:1]) if name in _FILLS else (taken, [])
            deepest = max([0, *around, *(depth + 1 for depth in inside)])
            if deepest > _MOST_DEPTH:
                raise ValueError("it is nested too deeply")
            depths.append(deepest)


def _taken(opcode: pickletools.OpcodeInfo, depths: list[int | None]) -> list[int]:
    """Take off the stack of depths what an instruction takes off a pickle's, the lowest first. Raises ValueError."""
    wanted, taken = list(opcode.stack_before), list[int]()
    if pickletools.markobject in wanted:
        wanted = wanted[: wanted.index(pickletools.markobject)]
        while depths and (depth := depths.pop()) is not None:
            taken.append(depth)
    for _ in wanted:
        if not depths or (depth := depths.pop()) is None:
            raise ValueError("it is no pickle")
        taken.append(depth)
    return taken[::-1]


def _num_bytes(tree: Any) -> int:
    """The size of all tensors in nested containers that may hold each other, or themselves."""
    todo, seen, total = [tree], set(), 0
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
    return total
