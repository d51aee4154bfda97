"""cm-train as a function: the same settings, composed and trained by the same code, in the caller's own process."""

import operator
import os
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..core.composing import composed_of
from ..core.errors import ExitCode, InputError
from ..core.override import quoted
from ..core.settings import excerpt
from ..core.signals import StopFlag

_KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@:]*")
_under_way = threading.Lock()  # Hydra, signals and a run's log are the process's


def train(settings: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """Train a run, or go on with it, as `cm-train` does with these settings; returns its folder.

    >>> train({"mode": "ct", "optimizer.lr": 1e-3}, dataset="digits", steps=1000)
    PosixPath('runs/digits-ct')

    Several processes (`devices=4`) are started as by the command; a script needs no `if __name__ == "__main__"`. The
    command line of the caller is neither read nor changed.

    Args:
        settings: keys as on the command line, values as Python has them: text, numbers, bools, None, paths, lists. A
            dict sets the keys in it: {"optimizer": {"lr": 1e-3}} is {"optimizer.lr": 1e-3}.
        more: further ones.

    Returns:
        The run's folder, also where `max_hours=` has ended the run: the same call goes on with it.

    Raises:
        InputError: a setting that can't be had, or one that differs from those that the run began with.
        TrainingFailed: training can't go on; the message says why, and what is kept.
        KeyboardInterrupt: Ctrl-C, or a notebook's stop button, once all is saved. A second one does not wait for that.
        SystemExit: another signal asked this process to end, once all is saved; its code is 3.
    """
    if not _under_way.acquire(blocking=False):
        fix = "one after the other, or cm-train in processes of their own"
        raise InputError("this process is training a run already", fix=fix)
    try:
        return _train(as_arguments({**_apart(settings or {}, more), **more}))
    finally:
        _under_way.release()


def _train(arguments: list[str]) -> Path:
    from ..core.world import is_launched
    from ..runs.config import Composed
    from ..runs.naming import named_for_its_pictures
    from ..runs.train import train as train_as_composed

    began = time.monotonic()
    if is_launched():
        raise InputError("torchrun starts commands, and this is a function", fix="cm-train under torchrun, or devices=")
    # Signals are the main thread's; in another one a deadline is all that stops a run.
    stop = StopFlag()
    heeding = stop if threading.current_thread() is threading.main_thread() else nullcontext()
    with heeding, composed_of(arguments) as cfg:
        composed = named_for_its_pictures(Composed.of(cfg))
        code = train_as_composed(composed, stop, began)
    if code == ExitCode.STOPPED and stop.caught:
        if signal.SIGINT in stop.caught:
            raise KeyboardInterrupt
        raise SystemExit(int(code))
    return composed.config.folder


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line. Raises InputError for what can't be one."""
    words: list[str] = []
    for key, value in settings.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise InputError("this is no key", excerpt(key), "a name as on the command line, such as optimizer.lr")
        if isinstance(value, Mapping) and value and all(isinstance(inner, str) for inner in value):
            words += as_arguments({f"{key}.{inner}": v for inner, v in value.items()})
        else:
            # Hydra takes new keys of a dict, as numbers are, where it is told so alone.
            are_new = isinstance(value, Mapping) and not key.startswith("+")
            words.append(f"{'++' * are_new}{key}={_as_text(key, value)}")
    return words


def _as_text(key: str, value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        return quoted(os.fsdecode(value))
    if isinstance(value, Integral):
        return str(operator.index(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_as_text(key, k)}:{_as_text(key, v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return "[" + ",".join(_as_text(key, v) for v in value) + "]"
    allowed = "text, a number, True, False, None, a path, a list or a dict"
    raise InputError(f"{key} can't be of this type", type(value).__name__, allowed)


def _apart(settings: Mapping[str, Any], more: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(settings, Mapping):
        raise InputError("settings are a dict", type(settings).__name__, '{"mode": "ct", "steps": 1000}')
    for key in more:
        if key in settings:
            raise InputError(f"{key} is set twice", f"{excerpt(settings[key])} and {excerpt(more[key])}", "once")
    return settings
