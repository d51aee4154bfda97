"""A run's folder on disk: its lock, its stored config, and whether a command starts or resumes it."""

import fcntl
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError
from .files import may_pass, not_through_a_link, patiently, read_small, unreadable, write_whole
from .registry import shown
from .tracking import complain

# What a folder may hold that is no run yet: what a command leaves that is killed at once, and what systems put there.
_NOTHING = frozenset([".lock", ".config.yaml.writing", ".DS_Store", "lost+found"])
_LOGS = (".log", ".out", ".err")  # the shell or a cluster may have made one before the command began
_PARTS = ("checkpoints", "samples", "snapshots", "tensorboard", "wandb")  # its folders
_KEYS = frozenset(["mode", "objective", "dataset", "backbone", "noise", "steps", "seed"])  # of every run's config

_MAX_CONFIG_BYTES = 1 << 18
_MAX_CONFIG_DEPTH = 32
_MAX_NUMBER_LENGTH = 100  # in characters; 0xfff... and 1:1:1:... can stand for integers that take for ever

_PLAIN = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")]

# What may differ between the command that started a run and the one that resumes it.
MAY_CHANGE = frozenset(
    [
        "dataset.root",  # its fingerprint tells whether it is the same
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


class FolderInUse(InputError):
    """Another process works in the folder; `is_kin` where the same command started it, as another job of its sweep."""

    def __init__(self, folder: Path, holder: str, what: str, setting: str):
        fix = f"wait for it, or set {'name' if setting == 'run_dir' else setting}=... for one of its own"
        super().__init__(f"{what} {folder} is in use by {holder or 'another process'}", fix=fix)
        self.is_kin = holder.endswith(_command())


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


@contextmanager
def lock(folder: Path, what: str = "run folder", setting: str = "run_dir") -> Iterator[None]:
    """Hold the folder for this process; the system lets go when the process ends, however it ends.

    Args:
        what, setting: what to call it, and the key that names another.

    Raises:
        InputError: another process holds it, or it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link: the folder may be a stranger's, and the file is emptied below.
        handle = open(folder / ".lock", "a+", errors="replace", opener=not_through_a_link)  # noqa: SIM115 - held for the whole run
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"can't write the {what} {folder}: {reason}", fix=f"set {setting}=...") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise FolderInUse(folder, handle.read().strip(), what, setting) from None
        except OSError as error:  # a file system without locks must not keep anyone from training
            complain(f"can't lock {folder} ({error.strerror}): don't start a second run in it")
        with suppress(OSError):  # a full disk keeps the name of the holder out, not the holder
            os.truncate(handle.fileno(), 0)
            os.write(handle.fileno(), f"process {os.getpid()} {_command()}".encode())
        yield


def check_ours(folder: Path) -> None:
    """Refuse a folder that holds somebody's files and no run, and one whose parts are links out of it.

    The run folder itself may be a link, to a larger disk for example. Raises InputError.
    """
    try:
        names = patiently(lambda: set(os.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return  # there is none yet, or the lock says what is wrong with it
    except OSError as error:
        raise unreadable(folder, error) from None
    others = sorted(name for name in names - _NOTHING if not name.startswith(".nfs") and not name.endswith(_LOGS))
    stored = stored_config(folder) if others else None
    if others and (stored is None or not set(stored) >= _KEYS):
        found = ", ".join(shown(name) for name in others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(
            f"{folder} holds other files and no run", found, "an empty folder or a run's", "set name=... or run_dir=..."
        )
    refuse_links(folder, _PARTS, "run_dir")


def refuse_links(folder: Path, parts: Iterable[str], setting: str) -> None:
    """Refuse to write into parts of a folder that lie elsewhere. Raises InputError, naming the key of the folder."""
    for name in parts:
        if os.path.islink(folder / name):
            raise InputError(
                f"{folder / name} is a link, which is not followed",
                fix=f"bring the folder itself back; for a larger disk move all of it there, and set {setting}=...",
            )


def _command() -> str:
    return f"({' '.join(Path(a).name for a in sys.argv[:1])} {' '.join(sys.argv[1:])})"


def stored_config(folder: Path) -> dict[str, Any] | None:
    """The config of the run in `folder`, or None where there is none.

    Raises:
        InputError: `config.yaml` is there and is not a config, or can't be read now.
    """
    path = folder / "config.yaml"
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
    write_whole(folder / "config.yaml", yaml.dump(dict(values), Dumper=_PlainDumper, sort_keys=False).encode())


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
