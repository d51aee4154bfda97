"""Draw the rooms of cm_train and who imports whom, from the imports: docs/rooms.svg, in docs/architecture.md.

python scripts/draw_rooms.py             draw it anew
python scripts/draw_rooms.py --check     exit with 1 where it is not what would be drawn
"""

import argparse
import ast
import importlib
import sys
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cm_train"
PICTURE = ROOT / "docs" / "rooms.svg"

# From the top of the house down: a module imports from rooms below its own, or its neighbours, never in a circle.
ROOMS = ["commands", "sweeps", "runs", "training", "objectives", "evaluation", "sampling", "models", "data", "core"]

WIDTH, BOX, HEIGHT, GAP, MARGIN = 880, 600, 40, 18, 16  # pixels; BOX is where floors end
COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#b79a20", "#e45756", "#9d755d", "#b279a2", "#439894", "#7f7f7f", "#333333"]


def modules() -> list[Path]:
    """Every file of the package but its own first one."""
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py" and "conf" not in p.parts)


def dotted(path: Path) -> str:
    """A module's name below cm_train."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def internal_imports(path: Path) -> set[str]:
    """Modules of this package that a module imports anywhere in it, by their names below cm_train."""
    package, known = path.relative_to(PACKAGE).parts[:-1], {dotted(p) for p in modules()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            inner = f"{base}.{alias.name}".strip(".")
            found.add(inner if inner in known else base)
    return found - {""}  # the package's own version


def between_rooms() -> Counter[tuple[str, str]]:
    """How many modules of one room are imported by modules of another: (importer's, imported one's) -> count."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in modules():
        own = dotted(path).split(".")[0]
        counts.update((own, other) for name in internal_imports(path) if (other := name.split(".")[0]) != own)
    return counts


def draw(counts: Counter[tuple[str, str]]) -> str:
    """The picture: a floor for each room, and an arc from it to each room that it imports from."""
    top = {room: MARGIN + i * (HEIGHT + GAP) for i, room in enumerate(ROOMS)}
    height = 2 * MARGIN + len(ROOMS) * (HEIGHT + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"',
        '     font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for i, room in enumerate(ROOMS):
        told = (importlib.import_module(f"cm_train.{room}").__doc__ or "").strip().rstrip(".")
        below = [other for other in ROOMS[i + 1 :] if counts[room, other]]
        for j, other in enumerate(below):
            # Arcs leave a floor side by side, the longest first, and arrive at the floor's left part for their origin.
            start = top[room] + HEIGHT * (j + 1) / (len(below) + 1)
            end = top[other] + HEIGHT * (i + 1) / (ROOMS.index(other) + 1)
            reach = BOX + 40 + 28 * (ROOMS.index(other) - i)
            width = 0.5 + (counts[room, other].bit_length() + 1) // 2  # in few steps, so that it seldom changes
            parts.append(
                f'<path d="M{BOX} {start:.1f} C{reach} {start:.1f} {reach} {end:.1f} {BOX + 8} {end:.1f}" fill="none"'
                f' stroke="{COLOURS[i]}" stroke-width="{width:.1f}" opacity="0.75"/>'
                f'<circle cx="{BOX + 6}" cy="{end:.1f}" r="{1.5 + width / 2:.1f}" fill="{COLOURS[i]}"/>'
            )
        parts.append(
            f'<rect x="{MARGIN}" y="{top[room]}" width="{BOX - MARGIN}" height="{HEIGHT}" rx="5" fill="{COLOURS[i]}"'
            f' fill-opacity="0.12" stroke="{COLOURS[i]}"/>'
            f'<text x="{MARGIN + 12}" y="{top[room] + 25}" font-size="16" font-weight="bold">{room}</text>'
            f'<text x="{MARGIN + 124}" y="{top[room] + 24}" font-size="11.5" fill="#333">{escape(told)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="draw nothing; exit with 1 where it would be another picture"
    )
    counts = between_rooms()
    picture = draw(counts)
    if parser.parse_args().check:
        if not PICTURE.exists() or PICTURE.read_text() != picture:
            sys.exit(f"{PICTURE.relative_to(ROOT)} is of other imports; fix: python scripts/draw_rooms.py")
        return
    PICTURE.write_text(picture)
    print(f"{counts.total()} imports between rooms, drawn in {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
