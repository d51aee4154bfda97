"""Names to classes and plain dicts to typed settings: the only way from a config to code.

The registry is closed: it knows the classes of this package alone and never imports a path that a config
names, so a config or checkpoint from a stranger can choose among our components and do nothing else.
"""

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import InputError

# Where each kind of component lives. A folder is searched file by file, so a new component is one new file.
_HOMES = {
    "backbone": "cm_train.models.backbones",
    "curriculum": "cm_train.objectives.noise",
    "dataset": "cm_train.data.datasets",
    "decay": "cm_train.models.averages",
    "objective": "cm_train.objectives",
    "optimizer": "cm_train.training.optimizers",
    "proposal": "cm_train.objectives.noise",
    "sampler": "cm_train.sampling.samplers",
}
_classes: dict[tuple[str, str], type] = {}

C = TypeVar("C", bound=type)
S = TypeVar("S", bound="Settings")

Positive = Annotated[float, Field(gt=0)]
MOST = 2**53  # floats, which schedules compute in, skip integers beyond it
Count = Annotated[int, Field(ge=1, le=MOST)]


def _check_given(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty, as a shell variable leaves it that is not set")
    return text


Text = Annotated[str, AfterValidator(_check_given)]  # what a user must have typed: a path, a name


def shown(value: object) -> str:
    """A value that a stranger chose, in at most 200 characters."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists without end
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


class Settings(BaseModel):
    """Base of every typed config: unknown keys and silent conversions are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def register(kind: str, name: str) -> Callable[[C], C]:
    """Class decorator: makes a class with a `Config` reachable as `name` among components of `kind`."""

    def add(cls: C) -> C:
        assert kind in _HOMES and (kind, name) not in _classes, f"{kind} {name} registered twice"
        _classes[kind, name] = cls
        return cls

    return add


@cache
def _import_home(kind: str) -> None:
    home = importlib.import_module(_HOMES[kind])
    for module in pkgutil.iter_modules(getattr(home, "__path__", [])):
        importlib.import_module(f"{home.__name__}.{module.name}")


def names(kind: str) -> list[str]:
    """All component names of a kind, sorted."""
    _import_home(kind)
    return sorted(name for k, name in _classes if k == kind)


def find(kind: str, name: object) -> Any:
    """The class that is registered as `name`. Raises InputError for a name that nobody registered."""
    if not isinstance(name, str) or name not in names(kind):
        close = difflib.get_close_matches(shown(name), names(kind), 1)
        raise InputError(
            f"unknown {kind}", shown(name), ", ".join(names(kind)), f"write {kind}.name={close[0]}" if close else None
        )
    return _classes[kind, name]


def settings(kind: str, values: Mapping[str, Any], where: str = "") -> Any:
    """The typed `Config` of the component that `values["name"]` names; errors call its keys `where.<key>`."""
    if not isinstance(values, Mapping):
        raise InputError(f"{kind} must be a group of keys with a name", shown(values), ", ".join(names(kind)))
    cls = find(kind, values.get("name"))
    return typed(cls.Config, {k: v for k, v in values.items() if k != "name"}, where or kind)


def build(kind: str, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Construct the named component as `cls(config, *args, **kwargs)`."""
    return find(kind, values.get("name") if isinstance(values, Mapping) else values)(
        settings(kind, values), *args, **kwargs
    )


def typed(cls: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """`values` as `cls`. Raises InputError naming the first wrong key, what it got and what is allowed."""
    try:
        return cls.model_validate(dict(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [part for part in first["loc"] if not re.search(r"[-\[(]", str(part))]  # not which type of several
        key = ".".join(shown(part) for part in (where, *place) if part != "")
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):  # from a component's settings inside: it names its own key
            raise cause from None
        if isinstance(cause, ValueError):  # from a check of several keys together
            raise InputError(f"{key}: {cause}" if key else str(cause)) from None
        if first["type"] == "extra_forbidden":
            known = list(_innermost(cls, first["loc"]).model_fields)
            close = difflib.get_close_matches(shown(first["loc"][-1]), known, 1)
            raise InputError(
                f"unknown key {key}", allowed=", ".join(known), fix=f"did you mean {close[0]}?" if close else None
            ) from None
        if first["type"] == "missing":
            raise InputError(f"{key} is missing", fix=f"set {key}=...") from None
        reason = first["msg"]
        raise InputError(f"{key}: {reason[0].lower()}{reason[1:]}", got=shown(first["input"])) from None


def _innermost(cls: type[Settings], path: tuple[int | str, ...]) -> type[Settings]:
    """The settings class that holds the last part of `path`."""
    for part in path[:-1]:
        field = cls.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            cls = field.annotation
    return cls
