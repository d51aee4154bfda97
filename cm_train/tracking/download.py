"""How far a download is, seen from outside: by what has arrived in its folder, whoever fetches it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .progress_bar import Progress

_LOOK_S = 0.5
_MB = 10**6


@contextmanager
def watched(folder: Path, what: str, total_mb: int | None = None) -> Iterator[None]:
    """Show how many megabytes `folder` grows by, as soon as it grows."""
    bar, over, before = Progress(total_mb, f"fetching {what}, MB"), threading.Event(), _size(folder)

    def look() -> None:
        while not over.wait(_LOOK_S):
            if _size(folder) - before >= _MB:
                break
        with bar:
            while not over.wait(_LOOK_S):
                bar.update((_size(folder) - before) // _MB)

    thread = threading.Thread(target=look, name="download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _size(folder: Path) -> int:
    """Bytes of the files right in a folder, 0 where there is none."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # just renamed
                total += entry.stat(follow_symlinks=False).st_size if entry.is_file() else 0
    return total
