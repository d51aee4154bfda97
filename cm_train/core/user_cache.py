"""Where what can be made again is kept between commands: $XDG_CACHE_HOME/cm-train, or ~/.cache/cm-train."""

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """A folder of the user's cache, which may not be there yet."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "cm-train" / part
