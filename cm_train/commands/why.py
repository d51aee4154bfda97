"""cm-train --why KEY ...: which files and words set a key, in the order in which they apply.

Hydra composes, and this asks it how: for the list of configs that it merges, for each of them alone, as it is just
before that, and for the entries by which files choose options of a group.
"""

import copy
import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import DefaultsTreeNode, GroupDefault, InputDefault, ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..core import cli, configs
from ..core.command_line import IMPLIED, OTHER
from ..core.errors import ExitCode, InputError, printable
from ..core.keys import Keys, all_keys

_FLAG = "--why="


def take_keys() -> list[str]:
    """What --why asks for, taken off the command line, which is Hydra's; nothing where --why is not there."""
    keys = [argument.removeprefix(_FLAG) for argument in sys.argv if argument.startswith(_FLAG)]
    sys.argv[:] = [argument for argument in sys.argv if not argument.startswith(_FLAG)]
    return keys


def explain(cfg: DictConfig, keys: Sequence[str]) -> ExitCode:
    """Print what set each of `keys` of `cfg`, which Hydra has just composed. Raises InputError for an unknown one."""
    composition = Composition(cfg)
    paragraphs = [composition.lines(part) for key in keys for part in composition.parts(key)]
    cli.tell("\n\n".join("\n".join(map(printable, lines)) for lines in paragraphs))
    return ExitCode.DONE


@dataclass(frozen=True)
class _Source:
    """A file or a word of the command line that sets something: the value as it is written, and why it is read."""

    place: str
    value: str = ""
    reason: str = ""
    is_exact: bool = False  # a file's value of the very key, rather than of what would be around it


class Composition:
    """What Hydra made `cfg` of, which is the last that it has composed."""

    def __init__(self, cfg: DictConfig):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        given: Any = OmegaConf.to_container(HydraConfig.get().overrides)  # a ${...} in them is not to be resolved
        words = [*given["hydra"], *given["task"]]
        self._words, self._repo = loader._parse_overrides_and_create_caching_repo("train", words)
        self._list = create_defaults_list(self._repo, "train", self._words, prepend_hydra=True, skip_missing=False)
        configs = [loader._load_single_config(default, self._repo).config for default in self._list.defaults]
        self._files = list(zip(self._list.defaults, map(OmegaConf.to_container, configs), strict=True))
        self._cfg, self._values = cfg, OmegaConf.to_container(cfg)

    def parts(self, key: str) -> list[str]:
        """`key`, or all keys in it where it is a mapping that is no group. Raises InputError where it is nothing."""
        if self._choices(key):
            return [key]
        found, value = _at(self._values, key)
        is_ours = key.split(".")[0] != "hydra"
        if found != key and not (is_ours and any(source.is_exact for source in self._settings(key))):
            known = [*all_keys(self._values), *set(self._repo.get_group_options("", ObjectType.GROUP)) - {"hydra"}]
            near = Keys("train", known).meant_by(key) or difflib.get_close_matches(key, known, 3, 0.6)
            fix = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "--cfg job shows all keys"
            raise InputError(f"unknown key {key}", fix=fix)
        inner = all_keys(value)
        leaves = [k for k in inner if not any(other.startswith(f"{k}.") for other in inner)]
        return [f"{key}.{leaf}" for leaf in leaves] or [key]

    def lines(self, key: str) -> list[str]:
        """What there is to say about a group, or about one key."""
        if choices := self._choices(key):
            chosen = _shown(self._list.overrides.known_choices.get(key, self._options(key)))
            files = [self._file(d.config_path) for d in self._list.defaults if _group(d) == key]
            return [f"{key} = {chosen}", *_rows(choices), f"  read: {', '.join(files) or 'nothing'}"]
        found, value = _at(self._values, key)
        return [f"{key} = {self._resolved(key, value)}" if found == key else key, *_rows(self._settings(key))]

    def _options(self, group: str) -> list[str] | None:
        """Those that were read of a group of which several are chosen; None where there are none."""
        paths = [d.config_path or "" for d in self._list.defaults if _group(d) == group]
        return [path.rpartition("/")[2] for path in paths] or None

    def _resolved(self, key: str, value: Any) -> str:
        if isinstance(value, str) and "${" in value:
            try:
                value = OmegaConf.select(self._cfg, key)
            except OmegaConfBaseException as error:
                return f"{value} ({str(error).splitlines()[0]})"
        return _shown(value)

    def _settings(self, key: str) -> list[_Source]:
        """What sets `key`, or what it is in, in the order in which Hydra merges it."""
        sources = []
        for default, values in self._files:
            found, value = _at(values, key)
            if found:
                text = _shown(value) if found == key else f"{found}: {_shown(value)}"
                sources.append(_Source(self._file(default.config_path), text, self._reason(default), found == key))
        for word in self._list.config_overrides:
            value = word.value()
            for part in reversed(word.key_or_group.split(".")):
                value = {part: value}
            if _at(value, key)[0]:
                reason = f"(since {OTHER[key]} is set)" if word.input_line in IMPLIED and key in OTHER else ""
                sources.append(_Source(f"command line: {word.input_line}", reason=reason))
        return sources

    def _choices(self, group: str) -> list[_Source]:
        """What chooses an option of `group`, the stronger later; empty where it is no group."""
        first: list[_Source] = []
        overrides: list[_Source] = []
        for node in _nodes(self._list.defaults_tree):
            loaded = self._repo.load_config(node.get_config_path())
            for entry in copy.deepcopy(loaded.defaults_list or []) if loaded is not None else []:
                if isinstance(entry, GroupDefault):
                    entry.update_parent(node.get_group_path(), node.get_final_package())
                    if entry.get_override_key() == group:
                        source = _Source(self._file(node.get_config_path()), _entry(entry))
                        (overrides if entry.override else first).append(source)
        words = [w for w in self._words if w.key_or_group == group and w not in self._list.config_overrides]
        return [*first, *overrides, *(_Source(f"command line: {word.input_line}") for word in words)]

    def _reason(self, default: ResultDefault) -> str:
        """Which file has a config read, where that is not train.yaml."""
        group = _group(default)
        how = self._list.overrides.override_metadata.get(group)
        if how is not None and how.containing_config_path is not None:
            return f"(by override /{group} in {self._file(how.containing_config_path)})"
        return f"(by {self._file(default.parent)})" if default.parent not in ("train", "<root>", None) else ""

    def _file(self, config_path: str | None) -> str:
        """Where a config lies: from conf/, or from the current folder, if it is in either."""
        loaded = self._repo.load_config(config_path) if config_path else None
        if config_path is None or loaded is None:
            return str(config_path)
        folder = loaded.path.removeprefix("file://")
        for home in (configs.conf_dir().parent, Path.cwd()):
            if Path(folder).is_relative_to(home):
                folder = str(Path(folder).relative_to(home))
        return f"{folder}/{config_path}.yaml"


def _nodes(tree: DefaultsTreeNode) -> Iterator[InputDefault]:
    """The configs of a defaults tree as their overrides overrule each other: one by one, then what they are in."""
    for child in tree.children or []:
        if isinstance(child, DefaultsTreeNode):
            yield from _nodes(child)
        elif not child.is_self() and not child.is_deleted() and child.get_name() is not None:
            yield child
    if not tree.node.is_virtual():
        yield tree.node


def _group(default: ResultDefault) -> str:
    return (default.config_path or "").rpartition("/")[0]


def _entry(entry: GroupDefault) -> str:
    """As it is written in a defaults list."""
    words = ["override"] * entry.override + ["optional"] * entry.optional
    return f"{' '.join([*words, str(entry.group)])}: {_shown(entry.value)}"


def _at(values: Any, key: str) -> tuple[str, Any]:
    """The value at `key`, with that key; or what there is in place of a mapping around it. ("", None): nothing."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        if not isinstance(values, dict):
            return ".".join(parts[:i]), values
        named = {str(name): value for name, value in values.items()}
        if part not in named:
            return "", None
        values = named[part]
    return key, values


def _shown(value: Any) -> str:
    """A value as YAML, in one line."""
    if isinstance(value, str) and value:
        return value
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20).split("\n")[0]


def _rows(sources: Sequence[_Source]) -> list[str]:
    """One line a source, in columns; the last one counts."""
    marks = [*("" for _ in sources[1:]), "<- counts"]
    columns = list(zip([s.place for s in sources], [s.value for s in sources], marks, strict=True))
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    cells = ["  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)) for row in columns]
    return [f"  {text}  {source.reason}".rstrip() for text, source in zip(cells, sources, strict=True)]
