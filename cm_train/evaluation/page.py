"""eval.html: the numbers, the images, their nearest neighbours and the protocol on one page that needs nothing else."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from .curve import curves
from .result import Result
from .table import REAL, rows

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.text { overflow-wrap: anywhere; }
img { max-width: 100%; image-rendering: pixelated; } svg { max-width: 100%; height: auto; }
.note { color: #8a4b00; } figure { margin: 1rem 0; } figcaption { color: #555; }
summary { cursor: pointer; }
"""


@dataclass
class Shown:
    """What a page shows of one result.

    Attributes:
        pictures: PNGs, by what is to be said of them.
    """

    result: Result
    pictures: Mapping[str, bytes] = field(default_factory=dict)


def page(title: str, shown: Sequence[Shown]) -> str:
    """The whole page, as text. Raises InputError where the results are of different protocols."""
    results = [each.result for each in shown]
    parts = [_table(*rows(results))]
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    if results[0].real:
        parts.append(f"<p>The row <i>{REAL}</i> is what real pictures score that no model was trained on.</p>")
    parts += curves(results)
    for each in shown:
        if len(shown) > 1 and each.pictures:
            parts.append(f"<h2>{escape(each.result.protocol.of.name)}</h2>")
        parts += [_figure(picture, words) for words, picture in each.pictures.items()]
    parts.append("<h2>How these numbers came about</h2>")
    parts += [_protocol(result, is_open=len(results) == 1) for result in results]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n'
        f"<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in cells)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def _figure(picture: bytes, words: str) -> str:
    source = base64.b64encode(picture).decode()
    caption = escape(words)
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _protocol(result: Result, is_open: bool) -> str:
    cells = [[key, _in_words(given)] for key, given in _flat(result.protocol.model_dump()).items() if given is not None]
    body = "".join(f'<tr><td>{escape(a)}</td><td class="text">{escape(b)}</td></tr>\n' for a, b in cells)
    attribute = " open" if is_open else ""
    return f"<details{attribute}><summary>{escape(result.protocol.of.name)}</summary><table>\n{body}</table></details>"


def _in_words(given: object) -> str:
    if isinstance(given, dict):
        return ", ".join(f"{name} {value}" for name, value in given.items())
    return ", ".join(map(str, given)) if isinstance(given, list) else str(given)


def _flat(values: Mapping[str, object]) -> dict[str, object]:
    """Of nested groups their keys with a dot, a level deep: what is deeper is one value."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": given for inner, given in value.items()}
        else:
            found[key] = value
    return found
