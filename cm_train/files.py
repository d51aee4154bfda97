"""Files in a run's folder: written whole or not at all, and never through a stranger's link."""

import os
from pathlib import Path


def not_through_a_link(path: str, flags: int) -> int:
    """For `open`: a stranger's run folder must not lead outside of itself."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before, even after a power cut."""
    beside = path.with_name(f".{path.name}.writing")
    with open(beside, "wb", opener=not_through_a_link) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
