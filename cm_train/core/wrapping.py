"""Lines that are longer than a terminal is wide, broken between words instead of where the terminal would."""

import os
import re
from typing import TextIO

_USUAL = 80
# A quoted part is one word, so that a folder's name with blanks in it can still be copied.
_WORD = re.compile(r"(\s*)((?:(?<![\w'])'[^'\n]*'|\S)+)")


def columns_of(stream: TextIO) -> int | None:
    """How wide the terminal behind `stream` is; None where there is none."""
    if not stream.isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL
    except (OSError, ValueError):
        return _USUAL


def fitted(text: str, columns: int | None) -> str:
    """`text` with its lines broken between words; a word that is longer than a line is left whole on its own.

    Args:
        columns: the longest line; None: any.
    """
    if columns is None or len(text) * 2 <= columns:  # a letter takes two columns at most
        return text
    return "\n".join(_broken(line, columns) for line in text.split("\n"))


def _broken(line: str, columns: int) -> str:
    from rich.cells import cell_len

    if cell_len(line) <= columns:
        return line
    margin = " " * (len(line) - len(line.lstrip()) + 2)
    lines = [""]
    for blanks, word in _WORD.findall(line):
        if not lines[-1] or cell_len(lines[-1] + blanks + word) <= columns:
            lines[-1] += blanks + word
        else:
            lines.append((margin if cell_len(margin + word) <= columns else "") + word)
    return "\n".join(lines)
