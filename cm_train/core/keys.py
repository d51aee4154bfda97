"""The keys that a command knows, and which of them somebody means who writes another word."""

import difflib
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .errors import InputError
from .synonyms import CONVERT, EVAL, HINTS, SAMPLE, TRAIN

_SYNONYMS = {"train": TRAIN, "sample": SAMPLE, "eval": EVAL, "convert": CONVERT}
_MOST = 3  # keys that one word may stand for
_OF_ALL = re.compile(r"^# @package _global_$", re.MULTILINE)


def all_keys(values: object, prefix: str = "") -> list[str]:
    """The dotted keys of nested mappings, each mapping's own before those in it."""
    keys: list[str] = []
    for k, v in values.items() if isinstance(values, dict) else ():
        keys += [f"{prefix}{k}", *all_keys(v, f"{prefix}{k}.")]
    return keys


@dataclass(frozen=True)
class Keys:
    """What a command can be told.

    Attributes:
        command: "train", "sample", "eval" or "convert".
        here: the keys, and the groups, that this command line has.
        elsewhere: those that other options of a group bring, with these options, as "dataset=mnist".
    """

    command: str
    here: Collection[str]
    elsewhere: Mapping[str, list[str]] = field(default_factory=dict)

    def meant_by(self, word: str) -> list[str]:
        """What `word` stands for beyond doubt: its keys as we call them, or settings; empty where it is anything."""
        plain = word.lower().replace("-", "_")
        if plain in self.here:
            return [plain]
        last = plain.rpartition(".")[2]
        targets = [target for target, words in _SYNONYMS[self.command].items() if last in words.split()]
        known = [*self.here, *self.elsewhere]
        found = [target for target in targets if target.partition("=")[0] in known]
        found = found or [key for key in known if key.rpartition(".")[2] == last and key != word]
        return found if len(found) <= _MOST else []

    def advice(self, word: str) -> str:
        """What to say to somebody for whom `word` was a key."""
        last = word.lower().rpartition(".")[2]
        if last in HINTS:
            return HINTS[last]
        if word in self.elsewhere:
            group = self.elsewhere[word][0].partition("=")[0]
            options = [option.partition("=")[2] for option in self.elsewhere[word]]
            return f"it comes with {group}={'|'.join(options)}"
        known = [*self.here, *self.elsewhere]
        beside = [key for key in known if key.rpartition(".")[0] == word.rpartition(".")[0]]
        near = self.meant_by(word) or difflib.get_close_matches(word, beside, 1, 0.5)
        near = near or difflib.get_close_matches(word, known, 1, 0.5)
        return f"did you mean {' or '.join(near)}?" if near else "see --help, or --cfg job for all keys"


def keys_of_options(conf: Path, groups: Collection[str]) -> dict[str, list[str]]:
    """The keys that are in the files of `groups`, with the options whose files they are, as "dataset=mnist"."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for group in groups for path in (conf / group).glob("*.yaml")):
        text = path.read_text()
        values = yaml.safe_load(text)
        group = path.parent.name
        keys = all_keys(values) if _OF_ALL.search(text) else all_keys(values, f"{group}.")
        for key in keys:
            found.setdefault(key, []).append(f"{group}={path.stem}")
    return found


def refuse_as_flags(arguments: Sequence[str], known: Sequence[str], meant_by: Callable[[str], list[str]]) -> None:
    """Say how a key is set that is written as other tools have it: --steps 100, -lr=1e-3.

    Args:
        known: the flags that there are.
        meant_by: see `Keys`.

    Raises:
        InputError: for the first of them.
    """
    for i, argument in enumerate(arguments):
        flag, has_value, value = argument.partition("=")
        word = flag.lstrip("-")
        is_flag = flag in known or (flag.startswith("--") and any(option.startswith(flag) for option in known))
        if is_flag or not re.fullmatch(r"--?[A-Za-z][\w.-]*", flag):
            continue
        keys = meant_by(word)
        if not keys:
            continue
        following = arguments[i + 1] if i + 1 < len(arguments) else "-"
        if not has_value:
            value = "..." if following.startswith("-") or "=" in following else following
        settings = [key if "=" in key else f"{key}={shlex.quote(value)}" for key in keys]
        raise InputError(f"{flag} is no flag; settings are written key=value", fix=" or ".join(settings))
