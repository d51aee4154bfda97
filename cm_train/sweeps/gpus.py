"""Which of the machine's GPUs a job may use, when several run side by side: never the same one twice."""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..core.errors import InputError
from ..core.files import not_through_a_link
from ..core.terminal import say


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]


@contextlib.contextmanager
def reserved(num: int, should_stop: Callable[[], bool]) -> Iterator[bool]:
    """Hold `num` GPUs for this process, and name them to the processes that it starts; wait until they are free.

    The system gives back what a process held, however it ended. Where there is no GPU there is nothing to hold.
    Yields False where `should_stop` ended the waiting.
    """
    names = visible()
    if not names:
        yield True
        return
    with contextlib.ExitStack() as held:
        mine = _take(num, names, held)
        if mine is None:
            say(f"waiting for {num} of {len(names)} GPUs")
        while mine is None:
            if should_stop():
                yield False
                return
            time.sleep(0.5)
            mine = _take(num, names, held)
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        try:
            yield True
        finally:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def _take(num: int, names: list[str], held: contextlib.ExitStack) -> list[str] | None:
    """Lock `num` of them for as long as `held` is open, or none: two jobs that each hold half would wait for ever."""
    mine = []
    with contextlib.ExitStack() as attempt:
        for name in names:
            path = locks_folder() / f"{name.replace('/', '-')}.lock"
            handle = attempt.enter_context(open(path, "w", opener=not_through_a_link))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine.append(name)
            if len(mine) == num:
                held.push(attempt.pop_all())
                return mine
    return None


def locks_folder() -> Path:
    """Where the locks of GPUs lie that jobs of this user hold. Raises InputError where it is somebody else's."""
    folder = Path(tempfile.gettempdir()) / f"cm-train-gpus-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError as error:
        raise InputError(f"can't lock GPUs in {folder}: {error.strerror}", fix="set TMPDIR=...") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # anybody may write beside it
        raise InputError(f"can't lock GPUs in {folder}: it is somebody else's", fix="set TMPDIR=...")
    return folder
