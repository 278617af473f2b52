"""Reports: every figure with its protocol as JSON, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff import __version__
from latentdiff.evaluate.figure import Figure
from latentdiff.images import write_file

__all__ = ["lines", "report_tree", "write_report"]

REPORT = "report.json"


def report_tree(figures: Sequence[Figure], subject: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report as JSON has it.

    Args:
        subject: what was measured: name and hash of the model, or the folder of pictures.
    """
    return {"version": __version__, **subject, "figures": [figure.to_json() for figure in figures]}


def write_report(figures: Sequence[Figure], subject: Mapping[str, Any], folder: Path) -> Path:
    """Write report.json into a folder and return its path.

    Raises:
        StorageError: it cannot be written.
    """
    path = folder / REPORT
    write_file(path, (json.dumps(report_tree(figures, subject), indent=2) + "\n").encode())
    return path


def lines(figures: Sequence[Figure]) -> Iterator[str]:
    """Yield a line for each figure: value, interval, n, floor and ceiling, and the digest of its protocol."""
    for figure in figures:
        bounds = [
            f"{name} {value:.4g}"
            for name, value in (("floor", figure.floor), ("ceiling", figure.ceiling))
            if value is not None
        ]
        beside = f" ({', '.join(bounds)})" if bounds else ""
        unit = f" {figure.unit}" if figure.unit else ""
        yield f"{figure.name}: {figure.estimate}{unit} of {figure.estimate.n}{beside} protocol {figure.protocol_digest}"
