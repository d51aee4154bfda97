"""Results of one protocol as one table, on a terminal and as rows for a page."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..core.errors import printable
from .protocol import check_comparable
from .result import Result

REAL = "held-out pictures"


def rows(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of a row a result, the first of which says what it is of.

    Raises:
        InputError: they are of different protocols.
    """
    check_comparable({result.protocol.of.name: result.protocol for result in results})
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    cells = [
        [result.protocol.of.name, *(str(result.metrics[n]) if n in result.metrics else "" for n in names)]
        for result in results
    ]
    if real := results[0].real:
        what = f"{REAL}, {results[0].num_real:,}"
        cells.append([what, *(f"{real[name]:.4g}" if name in real else "" for name in names)])
    return ["", *names], cells


def as_table(results: Sequence[Result]) -> Table:
    """For a terminal. Raises InputError, see `rows`."""
    headings, cells = rows(results)
    table = Table(*headings)
    for row in cells:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
