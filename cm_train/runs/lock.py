"""A run's folder: held by one process at a time, and nobody else's."""

import fcntl
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import InputError
from ..core.files import not_through_a_link, patiently, unreadable
from ..core.run_layout import CONFIG, FOLDERS, LOCK
from ..core.settings import excerpt
from ..core.terminal import complain
from .stored import stored_config

# What a folder may hold that is no run yet: what a command leaves that is killed at once, and what systems put there.
_NOTHING = frozenset([LOCK, f".{CONFIG}.writing", ".DS_Store", "lost+found"])
_LOGS = (".log", ".out", ".err")  # the shell or a cluster may have made one before the command began
_KEYS = frozenset(["mode", "objective", "dataset", "backbone", "noise", "steps", "seed"])  # of every run's config


class FolderInUse(InputError):
    """Another process works in the folder.

    Attributes:
        situation: that, and which process it is, without what to do.
        is_kin: whether the same command started it, as another job of its sweep.
    """

    def __init__(self, folder: Path, holder: str, what: str, setting: str):
        fix = f"wait for it, or set {'name' if setting == 'run_dir' else setting}=... for one of its own"
        self.situation = f"{what} {folder} is in use by {holder or 'another process'}"
        super().__init__(self.situation, fix=fix)
        self.is_kin = holder.endswith(_command())


@contextmanager
def lock(folder: Path, what: str = "run folder", setting: str = "run_dir") -> Iterator[None]:
    """Hold the folder for this process; the system lets go when the process ends, however it ends.

    Args:
        what, setting: what to call it, and the key that names another.

    Raises:
        InputError: another process holds it, it can't be written, or the command line can't be read.
    """
    check_words(str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not through a link: the folder may be a stranger's, and the file is emptied below. Held for the whole run.
        handle = open(folder / LOCK, "a+", encoding="utf-8", errors="replace", opener=not_through_a_link)  # noqa: SIM115
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


def check_words(*more: str) -> None:
    """Refuse words of the command line, and `more`, whose bytes are no letters here: no file could keep them as text.

    Raises:
        InputError: as where the locale knows ASCII alone, or where a folder's name is of another encoding.
    """
    encoding = sys.getfilesystemencoding()
    for word in (*sys.argv, *more):
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            fix = "rename it" if encoding == "utf-8" else "set LC_ALL=C.UTF-8, and no PYTHONUTF8=0"
            raise InputError(f"{encoding}, the encoding here, has no letters for this", word, fix=fix)


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
        found = ", ".join(excerpt(name) for name in others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(
            f"{folder} holds other files and no run", found, "an empty folder or a run's", "set name=... or run_dir=..."
        )
    refuse_links(folder, FOLDERS, "run_dir")


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
