"""A run's config.yaml: plain values, read as a stranger's."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import InputError
from ..core.files import may_pass, read_small, unreadable, write_whole
from ..core.run_layout import CONFIG

_MAX_CONFIG_BYTES = 1 << 18
_MAX_CONFIG_DEPTH = 32
_MAX_NUMBER_LENGTH = 100  # in characters; 0xfff... and 1:1:1:... can stand for integers that take for ever

_PLAIN = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")]


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

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text: str = super().construct_scalar(node)
        if len(text) > _MAX_NUMBER_LENGTH and not node.tag.endswith(":str"):
            raise yaml.YAMLError("a number is too long")
        return text


class _PlainDumper(yaml.SafeDumper):
    """Writes a list that is used twice out twice: the loader refuses aliases."""

    def ignore_aliases(self, data: object) -> bool:
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
