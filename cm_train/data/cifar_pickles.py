"""Pickles of numbers, text, lists, dictionaries and numpy's arrays, read without running anything.

Unpickling calls what a file names, and even an unpickler that allows few names can be made to fill the memory or to
compute for ever. So the few instructions that such a file needs are followed here, and a call that it asks for is
written down instead.
"""

import math
import pickletools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.settings import excerpt

_ENCODE = "_codecs encode"  # how Python 3 writes bytes for Python 2
_FUNCTIONS = (
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy ndarray",
    "numpy dtype",
    _ENCODE,
)
_LITERALS = (
    *("BININT", "BININT1", "BININT2"),
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LONGEST_KEY = 100


class _Function(str):
    """The name of a function, as a pickle writes it."""


@dataclass(eq=False)
class _Call:
    """A call that unpickling would have made, and the state that it would have given to the result."""

    function: str
    arguments: tuple[Any, ...]
    state: Any = None


def parse(content: bytes, most: int) -> Any:
    """What a pickle says, in at most `most` instructions; arrays are left to `array_of_bytes`.

    Raises ValueError, whatever is wrong with it.
    """
    try:
        return _follow(content, most)
    except LookupError as error:
        raise ValueError("has instructions that don't fit together") from error


def array_of_bytes(array: object, shape: tuple[int, int]) -> Tensor:
    """The array of this shape that numpy would make of what `parse` returned, uint8. Raises ValueError."""
    if not isinstance(array, _Call) or not isinstance(array.state, tuple) or len(array.state) != 5:
        raise ValueError("holds no array")
    _, its_shape, dtype, by_columns, raw = array.state
    if not isinstance(dtype, _Call) or dtype.arguments[:1] != ("u1",):
        raise ValueError("holds an array, but not of bytes")
    if its_shape != shape:
        raise ValueError(f"holds an array, but not of shape {shape}")
    raw = _text(raw)
    content = bytearray(raw.encode("latin-1") if isinstance(raw, str) else raw)
    if len(content) != math.prod(shape):
        raise ValueError(f"holds {len(content)} of {math.prod(shape)} values")
    values = torch.frombuffer(content, dtype=torch.uint8)
    return values.view(shape[::-1]).T if by_columns else values.view(shape)


def _follow(content: bytes, most: int) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def last(number: int) -> list[Any]:
        return since(len(stack) - number)

    def since(start: int) -> list[Any]:
        if start < 0:
            raise IndexError("too little on its stack")
        items = stack[start:]
        del stack[start:]
        return items

    for count, (instruction, arg, _) in enumerate(pickletools.genops(content)):
        if count >= most:
            raise ValueError(f"has more than {most} instructions")
        match instruction.name:
            case name if name in _LITERALS:
                stack.append(arg)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(last(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(since(marks.pop())))
            case "APPEND" | "APPENDS" as name:
                items = last(1) if name == "APPEND" else since(marks.pop())
                _checked(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS" as name:
                items = last(2) if name == "SETITEM" else since(marks.pop())
                _checked(stack[-1], dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL" as name:
                parts = [arg] if name == "GLOBAL" else last(2)
                stack.append(_allowed(" ".join(_checked(part, str) for part in parts)))
            case "REDUCE":
                function, arguments = last(2)
                stack.append(_Call(_checked(function, _Function), _checked(arguments, tuple)))
            case "BUILD":
                (state,) = last(1)
                _checked(stack[-1], _Call).state = state
            case "BINPUT" | "LONG_BINPUT":
                memo[_checked(arg, int)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[_checked(arg, int)])
            case "STOP":
                return stack[-1]
            case "PROTO" | "FRAME":
                pass
            case name:
                raise ValueError(f"has an instruction that it doesn't need ({name})")
    raise ValueError("has no end")


def _allowed(function: str) -> _Function:
    if function not in _FUNCTIONS:
        raise ValueError(f"asks for {excerpt(function.replace(' ', '.'))}, which it doesn't need")
    return _Function(function)


def _key(value: Any) -> str:
    """A key of a dictionary. Nothing but short text is hashed: tuples in tuples can be made to take for ever."""
    text = _text(value)[:_LONGEST_KEY]
    return text if isinstance(text, str) else text.decode("latin-1")


def _text(value: Any) -> str | bytes:
    """Text or bytes, which come as such or as text that is to be encoded."""
    if isinstance(value, _Call) and value.function == _ENCODE:
        (value, *_) = value.arguments
    return value if isinstance(value, bytes) else _checked(value, str)


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
