"""A report as a page: a table of all figures, and the best, median and worst pictures by each, in one file."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from latentdiff.encoding import encode
from latentdiff.errors import InputError
from latentdiff.evaluate.figure import Figure
from latentdiff.files import write_file
from latentdiff.images import open_stored, to_rgb
from latentdiff.marks import source_type_of

__all__ = ["STYLE", "details", "figure_table", "page", "write_page"]

PAGE = "report.html"
IN_ROW = 8  # pictures
SIDE = 128  # pixels of a picture's longer side, at most

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
details { color: var(--soft); font-size: 13px; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 .8rem; margin: .3rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: .6rem; }
figure { margin: 0; font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
figure img { width: 100%; border: 1px solid var(--line); border-radius: 4px; image-rendering: pixelated; }
figure b { display: block; }
"""


def page(figures: Sequence[Figure], subject: Mapping[str, Any], home: Path) -> str:
    """Return a report as HTML that needs no other file.

    Args:
        subject: what was measured, and how.
        home: folder from which figures name their pictures.
    """
    name = escape(str(subject.get("model") or subject.get("pictures") or "pictures"))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Evaluation of {name}</title>\n'
        f"<style>{STYLE}</style>\n<h1>Evaluation of {name}</h1>\n{details('What was measured', subject)}\n"
        f"{figure_table(figures)}\n{''.join(_grids(figure, home) for figure in figures)}</html>\n"
    )


def write_page(figures: Sequence[Figure], subject: Mapping[str, Any], folder: Path, home: Path) -> Path:
    """Write report.html into a folder and return its path.

    Raises:
        StorageError: it cannot be written.
    """
    path = folder / PAGE
    write_file(path, page(figures, subject, home).encode("utf-8", "backslashreplace"))
    return path


def figure_table(figures: Sequence[Figure]) -> str:
    """Return a table of figures as HTML, each with its protocol."""
    heads = "<tr><th>figure<th>value<th>95 % interval<th>n<th>floor<th>ceiling<th>better\n"
    return f"<table>\n{heads}{''.join(map(_row, figures))}</table>"


def _row(figure: Figure) -> str:
    found = figure.estimate
    cells = [
        f"{found.value:.4g} {escape(figure.unit)}",
        f"{found.low:.4g} to {found.high:.4g}" if found.low == found.low else "none",
        str(found.n),
        *("" if bound is None else f"{bound:.4g}" for bound in (figure.floor, figure.ceiling)),
    ]
    numbers = "".join(f'<td class="number">{cell}' for cell in cells)
    protocol = details(f"protocol {figure.protocol_digest}", figure.protocol)
    return f"<tr><td>{escape(figure.name)}{protocol}{numbers}<td>{figure.better or ''}\n"


def details(title: str, entries: Mapping[str, Any]) -> str:
    """Return entries as HTML that is folded up under a title."""
    rows = "".join(f"<dt>{escape(name)}<dd>{escape(str(value))}" for name, value in entries.items())
    return f"<details><summary>{escape(title)}</summary><dl>{rows}</dl></details>"


def _grids(figure: Figure, home: Path) -> str:
    """Return best, median and worst pictures; nothing where the figure is of none, or of too few to choose from."""
    names = [name for name in figure.items if name in figure.pictures]
    if not names or figure.better is None:
        return ""
    ranked = sorted(names, key=lambda name: figure.items[name], reverse=figure.better == "higher")
    middle = max(0, (len(ranked) - IN_ROW) // 2)
    rows = {"Best": ranked[:IN_ROW], "Median": ranked[middle : middle + IN_ROW], "Worst": ranked[-IN_ROW:]}
    chosen = rows if len(ranked) > IN_ROW else {"All, the best first": ranked}
    grids = "".join(
        f'<h3>{title}</h3><div class="row">{"".join(_cells(figure, row, home))}</div>\n'
        for title, row in chosen.items()
    )
    return f"<h2>By {escape(figure.name)}</h2>\n{grids}"


def _cells(figure: Figure, names: Sequence[str], home: Path) -> Iterator[str]:
    for name in names:
        prompt, _, _ = name.rpartition(" #")
        yield (
            f'<figure><img src="{_inlined(home / figure.pictures[name])}" alt="" title="{escape(name)}">'
            f"<b>{figure.items[name]:.4g}</b>{escape(prompt or name)}</figure>"
        )


def _inlined(path: Path) -> str:
    """Return a picture, made small and marked as it was, as the address of itself; nothing where it is gone since."""
    try:
        stored = open_stored(path)
        image = to_rgb(stored, name=str(path))
    except InputError:
        return ""
    image.thumbnail((SIDE, SIDE))
    return f"data:image/png;base64,{base64.b64encode(encode(image, source_type=source_type_of(stored))).decode()}"
