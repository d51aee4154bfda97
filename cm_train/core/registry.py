"""Names to components: the only way from a config to code.

The registry is closed: it knows the classes of this package, and of plugins that the user's command allows, and never
imports a path that a config names. A config or checkpoint from a stranger can choose among them and do nothing else.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

from pydantic import ValidationInfo, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler  # the package itself has it from 2.10 on

from .errors import InputError
from .settings import AS_WRITTEN, Mark, Settings, excerpt, typed

# Of each kind of component: the key of a run's config that names one, and where the classes live. A folder is searched
# file by file, so a new component is one new file.
KINDS = {
    "backbone": ("backbone.name", "cm_train.models.backbones"),
    "curriculum": ("noise.curriculum.name", "cm_train.objectives.noise"),
    "dataset": ("dataset.name", "cm_train.data.datasets"),
    "decay": ("ema.name", "cm_train.models.averages"),
    "distance": ("objective.distance", "cm_train.objectives"),
    "features": ("features.name", "cm_train.evaluation.features"),
    "metric": ("metrics", "cm_train.evaluation.metrics"),
    "objective": ("objective.name", "cm_train.objectives"),
    "optimizer": ("optimizer.name", "cm_train.training.optimizers"),
    "proposal": ("noise.proposal.name", "cm_train.objectives.noise"),
    "sampler": ("sampler", "cm_train.sampling.samplers"),
}
_classes: dict[tuple[str, str], Any] = {}
_plugins: dict[tuple[str, str], str] = {}  # which plugin brought a class, where one did
_registering: list[str] = []  # the plugin that is being imported

C = TypeVar("C", bound=type)


class UnknownComponent(InputError):
    """A config names what nobody has registered: `what`, as in "backbone 'resnet'"."""

    def __init__(self, kind: str, name: object):
        close = difflib.get_close_matches(excerpt(name), names(kind), 1)
        fix = f"write {KINDS[kind][0]}={close[0]}" if close else None
        super().__init__(f"unknown {kind}", excerpt(name), ", ".join(names(kind)), fix)
        self.what = f"{kind} {excerpt(name)!r}"


class ComponentConfig(Settings):
    """Base of the settings of all components of one kind; each class of them has its own `name` as the default.

    Where a field is of a kind's base class, plain values become the settings of the component that they name.
    """

    kind: ClassVar[str]
    name: str

    @model_validator(mode="wrap")
    @classmethod
    def _of_the_named(cls, values: Any, validate: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Any:
        is_base = cls.model_fields["name"].is_required()
        if not is_base or isinstance(values, cls):
            return validate(values)
        return settings(cls.kind, values, bool((info.context or {}).get(AS_WRITTEN)))


def register(cls: C) -> C:
    """Class decorator: makes a class reachable by the name that its `Config` has, among the components of its kind.

    Raises:
        ValueError: the `Config` has no name of its own, is of no kind, or another class has that name.
    """
    config: type[ComponentConfig] = cls.Config  # type: ignore[attr-defined]
    kind, name = config.kind, config.model_fields["name"].default
    if kind not in KINDS:
        raise ValueError(f"{cls.__name__} is a component of no kind: {kind!r}; allowed: {', '.join(KINDS)}")
    if not isinstance(name, str):
        raise ValueError(f"{cls.__name__}.Config has no name of its own, as in name: Literal['x'] = 'x'")
    if not cls.__module__.startswith("cm_train."):
        _import_home(kind)  # so that nobody takes the name of one of ours
    key = kind, name
    if key in _classes:
        raise ValueError(f"{kind} {name!r} is registered twice")
    _classes[key] = cls
    if _registering:
        _plugins[key] = _registering[-1]
    return cls


@contextmanager
def registering_for(plugin: str) -> Iterator[None]:
    """A context in which what is registered is of that plugin."""
    _registering.append(plugin)
    try:
        yield
    finally:
        _registering.pop()


def plugins_of(*configs: ComponentConfig) -> list[str]:
    """The plugins without which these are no settings of anything."""
    brought = (_plugins.get((config.kind, config.name)) for config in configs)
    return sorted({plugin for plugin in brought if plugin is not None})


@cache
def _import_home(kind: str) -> None:
    home = importlib.import_module(KINDS[kind][1])
    for module in pkgutil.iter_modules(getattr(home, "__path__", [])):
        importlib.import_module(f"{home.__name__}.{module.name}")


def names(kind: str) -> list[str]:
    """All component names of a kind, sorted."""
    _import_home(kind)
    return sorted(name for k, name in _classes if k == kind)


def _group(kind: str) -> str:
    """Where the settings of such components stand in a run's config."""
    return KINDS[kind][0].removesuffix(".name")


def find(kind: str, name: object) -> Any:
    """The class that is registered as `name`. Raises UnknownComponent for a name that nobody registered."""
    if not isinstance(name, str) or name not in names(kind):
        raise UnknownComponent(kind, name)
    return _classes[kind, name]


def settings(kind: str, values: Mapping[str, Any], as_written: bool = False) -> Any:
    """The settings of the component that `values["name"]` names, of its own class.

    Args:
        as_written: see `typed`.

    Raises:
        InputError: there is no such component, or a key of it is wrong.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{kind} must be a group of keys with a name", excerpt(values), ", ".join(names(kind)))
    config: type[ComponentConfig] = find(kind, values.get("name")).Config
    return typed(config, values, _group(kind), as_written)


def marked(mark: Mark) -> set[str]:
    """The keys of all components that `mark` is true of, as "dataset.root"."""
    configs = ((_group(kind), find(kind, name).Config) for kind in KINDS for name in names(kind))
    return {f"{group}.{key}" for group, config in configs for key in config.marked(mark)}


def component(config: ComponentConfig) -> Any:
    """The class that these are the settings of."""
    return find(config.kind, config.name)


def build(config: ComponentConfig, *args: Any, **kwargs: Any) -> Any:
    """The component of these settings, made as `cls(config, *args, **kwargs)`."""
    return component(config)(config, *args, **kwargs)


def make(kind: str, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The component that plain values name; see `settings` and `build`."""
    return build(settings(kind, values), *args, **kwargs)
