"""What Python processes that this one starts may import."""

import os
from pathlib import Path


def import_paths() -> dict[str, str]:
    """Variables for their environment: nothing from the current folder, which may be a stranger's, but this package."""
    own = str(Path(__file__).parents[2])
    paths = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), own]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}  # an empty one is the current
