"""Whether a command may resume a run: its config must mean the same one."""

from collections.abc import Mapping
from pathlib import Path

from ..core.errors import InputError
from ..core.settings import excerpt
from ..training.config import RunConfig, dump, may_change


def check_same_run(folder: Path, stored: RunConfig, wanted: RunConfig) -> None:
    """Refuse to resume with a config that means another run.

    Raises:
        InputError: naming each key that differs and may not.
    """
    old, new, free = _flat(dump(stored)), _flat(dump(wanted)), may_change()
    differing = [
        key
        for key in dict.fromkeys([*old, *new])
        if not {key, key.split(".")[0]} & free and old.get(key) != new.get(key)
    ]
    if differing:
        changes = ", ".join(f"{excerpt(k)} ({excerpt(old.get(k))} -> {excerpt(new.get(k))})" for k in differing[:6])
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise InputError(
            f"{folder} holds a run with another config: {changes}{more}",
            allowed=f"a change of {', '.join(sorted(free))}",
            fix="give this run a name=... of its own",
        )


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(values, Mapping) or not values:
        return {prefix: _plain(values)}
    out: dict[str, object] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _plain(value: object) -> object:
    """`value` as YAML would give it back."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
