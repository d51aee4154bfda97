"""One setting as a user types it, made into an override that Hydra takes for what is meant."""

import difflib
import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from .errors import InputError

# Keys whose values are text, whatever they look like: name=123 is a name.
TEXT = frozenset(
    ["name", "data_name", "run_dir", "teacher", "teacher_experiment", "init", "dataset.root", "ckpt", "out", "weights"]
    + ["src"]
    + ["from", "samples", "reference", "held_out", "features.path"]
    + ["budget", "teacher_budget", "notice", "dataset.group"]
    + [f"tracking.{key}" for key in ("project", "entity", "group")]
)
LISTS = frozenset(["labels", "metrics"])  # what takes several values without brackets around them
OPTIONAL_GROUPS = frozenset(["experiment"])  # null stands for none of their options
# What of Hydra's own settings means something here, and what to write in place of others.
_HYDRA = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.searchpath", "hydra.sweep.dir")
_INSTEAD = {
    "hydra.run": "run_dir=... says where a run lies",
    "hydra.sweep": "name=... and run_dir=... say where runs lie, hydra.sweep.dir=... where the sweep's records do",
    "hydra.mode": "-m makes a sweep",
    "hydra.verbose": "drop it; HYDRA_FULL_ERROR=1 shows where an error comes from",
}


def as_meant(text: str, groups: frozenset[str], is_sweep: bool) -> str:
    """One override, its value quoted where Hydra would not take it as it is meant.

    Raises:
        InputError: it is no setting, or what can't be set.
    """
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
    override = parsed(text)
    are_several = override is not None and isinstance(override._value, ChoiceSweep) and override._value.simple_form
    may_be = override is None and "," in value and value[0] not in "[\"'"
    if name in LISTS and (are_several or may_be) and not is_sweep:
        return as_meant(f"{key}=[{value}]", groups, is_sweep)
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
        return as_meant(f"{key}={value.strip()}", groups, is_sweep)
    candidates = [quoted(value)]
    if is_sweep:
        candidates.insert(0, _parts(value, name in TEXT | groups))
    if re.fullmatch(r"\[.*\]", value, re.DOTALL) and not {name} & (TEXT | groups):
        candidates.insert(0, f"[{_parts(value[1:-1])}]")
    for meant in candidates:
        if parsed(f"{key}={meant}") is not None:
            return f"{key}={meant}"
    raise InputError("can't make sense of an argument", text, "key=value, the key of letters, digits, _ and .")


def quoted(text: str) -> str:
    """`text` as one value of an override, whatever it holds; ${...} in it stays what it is."""
    return "'{}'".format(re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'"))


def parsed(text: str) -> Override | None:
    """An override as Hydra reads it; None where it can't."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


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
        override = parsed(f"key={part}")
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
