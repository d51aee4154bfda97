"""A run's config.yaml, and whether a command may resume what it describes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import InputError
from ..core.files import may_pass, read_small, unreadable, write_whole
from ..core.registry import shown
from ..core.run_layout import CONFIG

_MAX_CONFIG_BYTES = 1 << 18
_MAX_CONFIG_DEPTH = 32
_MAX_NUMBER_LENGTH = 100  # in characters; 0xfff... and 1:1:1:... can stand for integers that take for ever

_PLAIN = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")]

# What may differ between the command that started a run and the one that resumes it.
MAY_CHANGE = frozenset(
    [
        "dataset.root",  # its fingerprint tells whether it is the same
        "dataset.memory_gb",
        "dataset.download",
        "dataset.skip_broken",
        "dataset.max_megapixels",
        "dataset.class_level",
        "name",
        "run_dir",
        "steps",
        "micro_batch",
        "devices",
        "precision",
        "compile",
        "deterministic",
        "tracking",
        "save_every",
        "preview_every",
        "log_every",
        "keep",
        "max_hours",
        "max_skipped",
        "objective_metric",
        "fail_fast",
        "teacher",
    ]
)


class _PlainLoader(yaml.SafeLoader):
    """YAML of what JSON also knows: no dates or sets, and no aliases, by which a few lines can stand for gigabytes."""

    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, *_PLAIN)}
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        if self._depth == _MAX_CONFIG_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if len(text) > _MAX_NUMBER_LENGTH and not node.tag.endswith(":str"):
            raise yaml.YAMLError("a number is too long")
        return text


class _PlainDumper(yaml.SafeDumper):
    """Writes a list that is used twice out twice: the loader refuses aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def stored_config(folder: Path) -> dict[str, Any] | None:
    """The config of the run in `folder`, or None where there is none.

    Raises:
        InputError: `config.yaml` is there and is not a config, or can't be read now.
    """
    path = folder / CONFIG
    if not os.path.lexists(path):
        return None
    try:
        values = yaml.load(read_small(path, _MAX_CONFIG_BYTES).decode("utf-8"), _PlainLoader)
    except Exception as error:  # what is no YAML makes its reader raise nearly anything
        if may_pass(error):
            raise unreadable(path, error) from None
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a run's config", fix="name another run folder with name=... or run_dir=...")
    return values


def store_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `config.yaml` whole or not at all."""
    write_whole(folder / CONFIG, yaml.dump(dict(values), Dumper=_PlainDumper, sort_keys=False).encode())


def check_same_run(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume with a config that means another run.

    Raises:
        InputError: naming each key that differs and may not.
    """
    old, new = _flat(stored), _flat(wanted)
    differing = [
        k for k in dict.fromkeys([*old, *new]) if not {k, k.split(".")[0]} & MAY_CHANGE and old.get(k) != new.get(k)
    ]
    if differing:
        changes = ", ".join(f"{shown(k)} ({shown(old.get(k))} -> {shown(new.get(k))})" for k in differing[:6])
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise InputError(
            f"{folder} holds a run with another config: {changes}{more}",
            allowed=f"a change of {', '.join(sorted(MAY_CHANGE))}",
            fix="give this run a name=... of its own",
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values:
        return {prefix: _plain(values)}
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _plain(value: Any) -> Any:
    """`value` as YAML would give it back."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
