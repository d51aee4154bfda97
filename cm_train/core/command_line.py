"""What a user types, made into what Hydra takes: flags anywhere, values as meant, the impossible in one line."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from .errors import InputError
from .keys import refuse_as_flags

# Keys whose values are text, whatever they look like: name=123 is a name.
TEXT = frozenset(
    ["name", "data_name", "run_dir", "teacher", "teacher_experiment", "init", "dataset.root", "ckpt", "out", "weights"]
    + ["from", "samples", "reference", "held_out", "features.path"]
    + ["budget", "teacher_budget", "notice", "dataset.group"]
    + [f"tracking.{key}" for key in ("project", "entity", "group")]
)
LISTS = frozenset(["labels", "metrics"])  # what takes several values without brackets around them
OPTIONAL_GROUPS = frozenset(["experiment"])  # null stands for none of their options
# Two ways to say one thing: the one that is typed overrules the other, whatever file that is from.
OTHER = {"ema.decay": "ema.half_life_images", "ema.half_life_images": "ema.decay"}
IMPLIED = frozenset(f"++{key}=null" for key in OTHER)
# What of Hydra's own settings means something here, and what to write in place of others.
_HYDRA = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.searchpath", "hydra.sweep.dir")
_INSTEAD = {
    "hydra.run": "run_dir=... says where a run lies",
    "hydra.sweep": "name=... and run_dir=... say where runs lie, hydra.sweep.dir=... where the sweep's records do",
    "hydra.mode": "-m makes a sweep",
    "hydra.verbose": "drop it; HYDRA_FULL_ERROR=1 shows where an error comes from",
}
_NO_FLAGS = {
    "config_path": "--config-dir adds a folder of configs to ours",
    "config_name": "make it experiment/<name>.yaml in a folder given with --config-dir, and write experiment=<name>",
    "experimental_rerun": "the same command again goes on with a run",
    "package": "drop it",
}
_INFO = ("--info", "-i")


def tidy(
    arguments: Sequence[str],
    groups: Iterable[str],
    plain: str | None = None,
    meant_by: Callable[[str], list[str]] | None = None,
) -> list[str]:
    """Command-line arguments as Hydra takes them: flags first, values quoted where they would mean something else.

    Args:
        groups: the config groups, as "mode".
        plain: the key that an argument without one is for, at most once; "ckpt..." takes several, as one list.
        meant_by: which keys a word stands for, see `Keys.meant_by`.

    Raises:
        InputError: an unknown flag, what is no setting, or what can't be had.
    """
    parser = get_args_parser()
    parser.error = _fail  # type: ignore[method-assign]
    if plain is None:
        parser.add_argument("--why", nargs="*", action="extend")
    if meant_by is not None:
        refuse_as_flags(arguments, list(parser._option_string_actions), meant_by)
    options = parser.parse_intermixed_args(_with_what_to_show(parser, arguments))
    for name, instead in _NO_FLAGS.items():
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} does not work with this command", fix=instead)
    asked = _take_why(options) if plain is None else []
    options.run = False  # which is what happens anyway
    flags: list[str] = []
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if action.option_strings and value not in (None, False):
            flags.append(action.option_strings[0] if value is True else f"{action.option_strings[0]}={value}")
    known, is_sweep = frozenset(groups), bool(options.multirun)
    settings = _with_keys(options.overrides, plain) if plain else options.overrides
    return [*asked, *flags, *(_as_meant(text, known, is_sweep) for text in settings), *_overruled(settings)]


def _take_why(options: argparse.Namespace) -> list[str]:
    """The keys that --why asks about, each as a flag of its own; of its words those that are settings go to these."""
    if options.why is None:
        return []
    words, options.why = [*options.overrides, *options.why], None
    keys = [word for word in words if "=" not in word and not word.startswith("~")]
    options.overrides = [word for word in words if word not in keys]
    if options.help:
        return []
    if not keys or "" in keys:
        raise InputError("--why needs a key", fix="--why steps")
    for name in ("multirun", "cfg", "info", "shell_completion"):
        if getattr(options, name):
            raise InputError(f"--why and --{name.replace('_', '-')} are two commands", fix="one of them")
    return [f"--why={key}" for key in keys]


def _overruled(settings: Iterable[str]) -> list[str]:
    """What `settings` set to null without saying so."""
    values = {key.lstrip("+"): value for key, _, value in (text.partition("=") for text in settings)}
    given = {key for key, value in values.items() if value.strip().lower() not in ("null", "~")}
    return [f"++{other}=null" for key, other in OTHER.items() if key in given and other not in values]


def with_configs_of_plugins(arguments: Sequence[str]) -> list[str]:
    """Tidy arguments with the folders of configs that the plugins bring which plugins=[...] allows.

    Raises:
        InputError: no such plugin is installed, or it is no list.
    """
    names: list[str] = []
    places: list[str] = []
    others: list[str] = []
    for argument in arguments:
        override = None if argument.startswith("-") else _parsed(argument)
        key = "" if override is None else override.key_or_group
        value = override.value() if override is not None and key in ("plugins", "hydra.searchpath") else None
        if key == "hydra.searchpath" and isinstance(value, list):
            places += map(str, value)
            continue
        others.append(argument)
        if key == "plugins":
            if not isinstance(value, list):
                given = argument.partition("=")[2]
                what = "plugins is a list, one for all jobs of a sweep"
                raise InputError(what, given, "[name,...]", f"plugins=[{given}]")
            names += map(str, value)
    if not names:
        return list(arguments)
    from .plugins import conf_folders

    places += [f"file://{folder}" for folder in conf_folders(names)]
    return [*others, f"hydra.searchpath=[{','.join(map(quoted, places))}]"] if places else others


def quoted(text: str) -> str:
    """`text` as one value of an override, whatever it holds; ${...} in it stays what it is."""
    return "'{}'".format(re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'"))


def _fail(message: str) -> NoReturn:
    raise InputError(message, fix="--help shows what there is; settings are written key=value")


def _with_what_to_show(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """`arguments` where --info has its own value: argparse would take whatever follows for that."""
    choices = next(action.choices for action in parser._actions if action.dest == "info")
    given = list(arguments)
    for i, argument in enumerate(given):
        if argument in _INFO and (i + 1 == len(given) or given[i + 1] not in (choices or ())):
            given[i] = f"{_INFO[0]}=all"
    return given


def _with_keys(settings: Sequence[str], plain: str) -> list[str]:
    """`settings`, those that are no key=value with the key `plain`."""
    if plain.endswith("..."):
        plain = plain.removesuffix("...")
        words = [text for text in settings if "=" not in text and not text.startswith("~")]
        if len(words) > 1:
            settings = [f"{plain}=[{','.join(words)}]", *(text for text in settings if text not in words)]
    given = [text if "=" in text or text.startswith("~") else f"{plain}={text}" for text in settings]
    own = [text for text in given if text.startswith(f"{plain}=")]
    if len(own) > 1:
        raise InputError(f"{plain} is given more than once", " ".join(own), "once", f"-m {plain}=A,B for a run of each")
    return given


def _as_meant(text: str, groups: frozenset[str], is_sweep: bool) -> str:
    """One override, its value quoted where Hydra would not take it as it is meant."""
    key, has_value, value = text.partition("=")
    name = key.lstrip("+~").split("@")[0]
    if not name:
        raise InputError("this is no setting", text, "key=value")
    if text == "recipe=null":
        return "recipe=none"
    if text in {f"{group}=null" for group in OPTIONAL_GROUPS & groups}:
        return f"~{name}"  # Hydra takes null in YAML alone
    if key.startswith("~") and name in groups - OPTIONAL_GROUPS:
        raise InputError(f"{text}: a run can't be without its {name}", fix=f"{name}=..., see --help")
    if name.startswith("hydra"):
        _check_hydra(name)
    elif not has_value and not key.startswith("~"):
        near = difflib.get_close_matches(text, groups, 1)
        raise InputError(
            "this is no setting", text, "key=value", f"{near[0]}=..., see --help" if near else "see --help"
        )
    override = _parsed(text)
    are_several = override is not None and isinstance(override._value, ChoiceSweep) and override._value.simple_form
    may_be = override is None and "," in value and value[0] not in "[\"'"
    if name in LISTS and (are_several or may_be) and not is_sweep:
        return _as_meant(f"{key}=[{value}]", groups, is_sweep)
    if override is not None and override.is_sweep_override() and not is_sweep and name not in TEXT:
        raise InputError(
            f"{name} has several values", value, "one", f"-m for a run of each, or {key}=[{value}] for a list"
        )
    if name in TEXT:
        _check_interpolation(text, value)
    if name == "labels" and override is not None and isinstance(override._value, int | float):
        override = override if value == str(override._value) and value.isdecimal() else None  # true and 1_000 are names
    is_list = override is not None and name in LISTS and isinstance(override._value, list)
    if override is not None and not is_list and (name in TEXT or name in groups):
        override = override if _is_text(override, name, is_sweep) else None
    if override is not None:
        return text
    if name in groups and value.strip() != value:
        return _as_meant(f"{key}={value.strip()}", groups, is_sweep)
    candidates = [quoted(value)]
    if is_sweep:
        candidates.insert(0, _parts(value, name in TEXT | groups))
    if re.fullmatch(r"\[.*\]", value, re.DOTALL) and not {name} & (TEXT | groups):
        candidates.insert(0, f"[{_parts(value[1:-1])}]")
    for meant in candidates:
        if _parsed(f"{key}={meant}") is not None:
            return f"{key}={meant}"
    raise InputError("can't make sense of an argument", text, "key=value, the key of letters, digits, _ and .")


def _is_text(override: Override, name: str, is_sweep: bool) -> bool:
    """Whether Hydra reads it as text, or as what stands for several texts; null may stand for none."""
    value: Any = override._value
    if isinstance(value, ChoiceSweep) and value.simple_form:
        return is_sweep and all(isinstance(choice, str | QuotedString) for choice in value.list)
    if override.is_sweep_override():
        return is_sweep
    if value is None:
        return name in OPTIONAL_GROUPS or name in TEXT
    typed = (override.input_line or "").partition("=")[2]
    return isinstance(value, QuotedString) or value == typed  # blanks, and backslashes, are what they are


def _parts(text: str, are_text: bool = False) -> str:
    """Several values with commas between them, each quoted where that has to be."""
    parts = []
    for part in text.split(","):
        override = _parsed(f"key={part}")
        is_read = override is not None and (not are_text or isinstance(override._value, str | QuotedString))
        parts.append(part if is_read else quoted(part))
    return ",".join(parts)


def _check_interpolation(text: str, value: str) -> None:
    """Refuse a ${ that stands for nothing, which is an error deep inside otherwise."""
    if "${" not in value:
        return
    try:
        parse(value)
    except OmegaConfBaseException:
        fix = "${key} stands for the value of another key; leave the $ out"
        raise InputError("a ${ without its key", text, "${key}", fix) from None


def _check_hydra(name: str) -> None:
    if name.startswith(_HYDRA):
        return
    instead = next((words for prefix, words in _INSTEAD.items() if name.startswith(prefix)), "drop it")
    raise InputError(f"{name} is Hydra's own, and does not work here", allowed=", ".join(_HYDRA), fix=instead)


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None
