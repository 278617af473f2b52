"""Reports: every figure with its protocol as JSON, in a folder that holds one evaluation alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff import __version__
from latentdiff.errors import InputError
from latentdiff.evaluate.figure import Figure, Protocol, difference, read_figures
from latentdiff.files import is_file, is_folder, make_folder, parse_json, read_file, write_file

__all__ = ["claim", "lines", "merged", "read_report", "release", "report_tree", "write_report"]

REPORT = "report.json"
REQUEST = "request.json"
MOST = 256 * 2**20  # bytes of a report


def report_tree(figures: Sequence[Figure], subject: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report as JSON has it.

    Args:
        subject: what was measured, and how: see `claim`.
    """
    return {"version": __version__, "subject": dict(subject), "figures": [figure.to_json() for figure in figures]}


def claim(folder: Path, subject: Mapping[str, Any]) -> None:
    """Make a folder that of an evaluation, before anything is drawn into it.

    Args:
        subject: model or pictures, their hash, data, n, seed and settings: all that pictures and figures depend on.

    Raises:
        InputError: it is that of another one.
        StorageError: it cannot be written.
    """
    make_folder(folder)
    path = folder / REQUEST
    if is_file(path):
        held = _read_object(path)
        if apart := difference(held, json.loads(json.dumps(subject))):
            raise InputError(f"{folder} holds another evaluation ({apart}); choose another --out")
        return
    if is_file(folder / REPORT):
        raise InputError(f"{folder} holds a report that does not say of what; choose another --out")
    write_file(path, (json.dumps(subject, indent=2) + "\n").encode())


def release(folder: Path) -> None:
    """Give a folder back in which nothing came of an evaluation, so that one with other settings may have it."""
    if [path for path in folder.rglob("*") if not path.is_dir()] == [folder / REQUEST]:
        shutil.rmtree(folder)


def merged(folder: Path, figures: Sequence[Figure]) -> list[Figure]:
    """Return the figures of the report that is there already, and new ones, in place of those of the same protocol."""
    before = read_report(folder)[1] if is_file(folder / REPORT) else []
    found = {(figure.name, figure.protocol_digest): figure for figure in before}
    return list({**found, **{(figure.name, figure.protocol_digest): figure for figure in figures}}.values())


def write_report(figures: Sequence[Figure], subject: Mapping[str, Any], folder: Path) -> Path:
    """Write report.json into a folder and return its path.

    Raises:
        StorageError: it cannot be written.
    """
    path = folder / REPORT
    write_file(path, (json.dumps(report_tree(figures, subject), indent=2) + "\n").encode())
    return path


def read_report(place: Path) -> tuple[Mapping[str, Any], list[Figure]]:
    """Return subject and figures of a report.

    Args:
        place: report.json, or the folder that it is in.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    tree = _read_object(place / REPORT if is_folder(place) else place)
    subject = tree.get("subject")
    return (subject if isinstance(subject, dict) else {}), read_figures(tree)


def lines(figures: Sequence[Figure]) -> Iterator[str]:
    """Yield a line for each figure: value, interval, n, floor and ceiling, and the digest of its protocol.

    After them, what all of their protocols have in common, and the rest of each.
    """
    for figure in figures:
        bounds = [
            f"{name} {value:.4g}"
            for name, value in (("floor", figure.floor), ("ceiling", figure.ceiling))
            if value is not None
        ]
        beside = f" ({', '.join(bounds)})" if bounds else ""
        unit = f" {figure.unit}" if figure.unit else ""
        yield f"{figure.name}: {figure.estimate}{unit} of {figure.estimate.n}{beside} protocol {figure.protocol_digest}"
    yield from _legend({figure.protocol_digest: figure.protocol for figure in figures})


def _legend(protocols: Mapping[str, Protocol]) -> Iterator[str]:
    """Yield what all protocols have in common, and the rest of each, by its digest."""
    first = next(iter(protocols.values()), {})
    common = {name for name in first if all(one.get(name) == first[name] for one in protocols.values())}
    for title, one, told in (
        ("every protocol", first, common),
        *((f"protocol {digest}", one, one.keys() - common) for digest, one in protocols.items()),
    ):
        if told:
            yield f"{title}: {', '.join(f'{name} {one[name]}' for name in one if name in told)}"


def _read_object(path: Path) -> Mapping[str, Any]:
    tree = parse_json(read_file(path, MOST, "report"), str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path} is no report; pass the report.json of latentdiff evaluate, or its folder")
    return tree
