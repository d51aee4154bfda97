"""Typed settings: plain values of a config become one class, whose keys say what they are, or one line of error."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from .errors import InputError

S = TypeVar("S", bound="Settings")

Positive = Annotated[float, Field(gt=0)]
MAX_EXACT = 2**53  # floats, which schedules compute in, skip integers beyond it
Count = Annotated[int, Field(ge=1, le=MAX_EXACT)]


def _check_given(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty, as a shell variable leaves it that is not set")
    return text


Text = Annotated[str, AfterValidator(_check_given)]  # what a user must have typed: a path, a name


@dataclass(frozen=True)
class Mark:
    """A fact about a key, told where the key is defined: `steps: Annotated[int, MAY_CHANGE]`."""

    meaning: str


MAY_CHANGE = Mark("the command that resumes a run may set it to another value")
OF_RECIPE = Mark("how a network is trained, not what it is: a student has its own, and its teacher's network")
NOT_IDENTITY = Mark("how a data set is found and used, not which images and labels it has")


def excerpt(value: object) -> str:
    """A value that a stranger chose, in at most 200 characters."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists without end
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


class Settings(BaseModel):
    """Base of every typed config: unknown keys and silent conversions are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def marked(cls, mark: Mark) -> set[str]:
        """The names of the keys that `mark` is true of."""
        return {name for name, field in cls.model_fields.items() if mark in field.metadata}

    @model_validator(mode="before")
    @classmethod
    def _with_whole_numbers(cls, values: Any, info: ValidationInfo) -> Any:
        """A person writes 1e5 for an integer, which YAML and Hydra read as the float 100000.0."""
        if not (info.context or {}).get(AS_WRITTEN) or not isinstance(values, dict):
            return values
        counts = {name for name, field in cls.model_fields.items() if _takes_integers(field.annotation)}
        return {key: _whole(value) if key in counts else value for key, value in values.items()}


AS_WRITTEN = "as written"  # of a validation's context: the values are what a person wrote, not what a program stored


def _takes_integers(annotation: Any) -> bool:
    """Whether a number of that type can only be an integer."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes_integers(parts[0])
    if origin in (Union, UnionType):
        return float not in parts and any(map(_takes_integers, parts))
    return annotation is int


def _whole(value: Any) -> Any:
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT
    return int(value) if is_whole else value


def typed(cls: type[S], values: Mapping[str, Any], where: str = "", as_written: bool = False) -> S:
    """`values` as `cls`.

    Args:
        where: what stands before the keys in a message.
        as_written: whether a person wrote them, who may write an integer as 1e5.

    Raises:
        InputError: the first wrong key, what it got and what is allowed.
    """
    try:
        return cls.model_validate(dict(values), strict=True, context={AS_WRITTEN: as_written})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [part for part in first["loc"] if not re.search(r"[-\[(]", str(part))]  # not which type of several
        key = ".".join(excerpt(part) for part in (where, *place) if part != "")
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):  # from a component's settings inside: it names its own key
            raise cause from None
        if isinstance(cause, ValueError):  # from a check of several keys together
            raise InputError(f"{key}: {cause}" if key else str(cause)) from None
        if first["type"] == "extra_forbidden":
            known = list(_innermost(cls, first["loc"]).model_fields)
            close = difflib.get_close_matches(excerpt(first["loc"][-1]), known, 1)
            raise InputError(
                f"unknown key {key}", allowed=", ".join(known), fix=f"did you mean {close[0]}?" if close else None
            ) from None
        if first["type"] == "missing":
            raise InputError(f"{key} is missing", fix=f"set {key}=...") from None
        reason = first["msg"]
        raise InputError(f"{key}: {reason[0].lower()}{reason[1:]}", got=excerpt(first["input"])) from None


def _innermost(cls: type[Settings], path: tuple[int | str, ...]) -> type[Settings]:
    """The settings class that holds the last part of `path`."""
    for part in path[:-1]:
        field = cls.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            cls = field.annotation
    return cls
