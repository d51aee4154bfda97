"""The share of each room's lines that tests run, held to a floor: what `scripts/test.sh --coverage` ends with.

    python scripts/coverage_floors.py calls.json all.json     reports of `coverage json`, of two stages

The first is of the tests that call functions, the second of those and of whole commands. A floor is a little below what
was measured when it was set: raise it when a room is better tested, and lower it for no reason but code that is gone.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Percent by calls, and with whole commands.
FLOORS = {
    "commands": (90, 94),
    "sweeps": (51, 82),
    "runs": (74, 90),
    "training": (90, 97),
    "objectives": (96, 97),
    "evaluation": (98, 98),
    "sampling": (97, 98),
    "models": (95, 96),
    "data": (96, 96),
    "core": (82, 93),
}


def by_room(report: Path) -> dict[str, float]:
    """Percent of each room's statements that were run."""
    run, all_of = Counter[str](), Counter[str]()
    for name, told in json.loads(report.read_text())["files"].items():
        if not name.startswith("cm_train/"):  # a part that a test has put there for a moment
            continue
        room = Path(name).parts[1]
        run[room] += told["summary"]["covered_lines"]
        all_of[room] += told["summary"]["num_statements"]
    return {room: 100 * run[room] / all_of[room] for room in all_of if all_of[room]}


def main() -> None:
    """The command line."""
    stages = [by_room(Path(report)) for report in sys.argv[1:3]]
    table = Table("room", "by calls", "floor", "with commands", "floor")
    low = []
    for room, floors in FLOORS.items():
        found = [stage.get(room, 0.0) for stage in stages]
        low += [room for share, floor in zip(found, floors, strict=True) if share < floor]
        cells = [f"{value:.1f}" for pair in zip(found, floors, strict=True) for value in pair]
        table.add_row(room, *cells, style="red" if room in low else None)
    Console().print(table)
    if low:
        sys.exit(f"below the floor: {', '.join(dict.fromkeys(low))}")


if __name__ == "__main__":
    main()
