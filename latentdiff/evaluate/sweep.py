"""Several settings of one model: a report of each, a table of all, and a plot of quality against cost."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from latentdiff.evaluate.figure import Figure
from latentdiff.files import write_file

__all__ = ["Setting", "folder_name", "sweep_lines", "write_sweep"]

TABLE, PLOT = "sweep.csv", "sweep.svg"
COST = "speed/seconds_to_picture"  # what quality is drawn against, where it was measured; else calls of the network
STYLE = (
    "svg{background:#fff;color:#222;font:11px sans-serif}"
    "@media(prefers-color-scheme:dark){svg{background:#181818;color:#ddd}}"
)
WIDTH, HEIGHT, MARGIN, LEGEND = 420, 260, 56, 200  # of a plot, and the width of what explains it, in pixels
TICKS = 6  # where there are more costs, only the ends are named
COLOURS = ("#2f7ed8", "#d9534f", "#3a9d5d", "#b07cc6", "#e08e0b", "#17a2a2", "#8c6d46", "#777777")


@dataclass(frozen=True)
class Setting:
    """One combination of settings.

    Attributes:
        chosen: what is swept, by the names of the flags.
        figures: what was measured with it.
    """

    chosen: Mapping[str, object]
    figures: Sequence[Figure]

    @property
    def name(self) -> str:
        """How tables and plots call it."""
        return ", ".join(f"{name}={value}" for name, value in self.chosen.items())

    def value(self, name: str) -> float:
        """Return the value of a figure, NaN where it is not there."""
        return next((one.estimate.value for one in self.figures if one.name == name), math.nan)

    @property
    def series(self) -> str:
        """What a plot joins by a line: the name without the steps."""
        return ", ".join(f"{name}={value}" for name, value in self.chosen.items() if name != "steps")

    @property
    def cost(self) -> float:
        """Seconds to a picture, or steps where speed was not measured."""
        told = self.figures[0].protocol.get("num_inference_steps") if self.figures else None
        steps = float(told) if isinstance(told, (int, float)) else math.nan
        found = self.value(COST)
        return steps if math.isnan(found) else found


def folder_name(chosen: Mapping[str, object]) -> str:
    """Return the folder of a combination: steps=4,sampler=euler."""
    return re.sub(r"[^\w.=,+-]", "_", ",".join(f"{name}={value}" for name, value in chosen.items()))


def sweep_lines(found: Sequence[Setting]) -> Iterator[str]:
    """Yield a table: a line for each combination, a column for each figure."""
    names = list(dict.fromkeys(one.name for setting in found for one in setting.figures))
    rows = [["", *names], *([one.name, *(f"{one.value(name):.4g}" for name in names)] for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def write_sweep(found: Sequence[Setting], folder: Path) -> None:
    """Write sweep.csv, a line for each figure of each combination, and sweep.svg.

    Raises:
        StorageError: they cannot be written.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*found[0].chosen, "figure", "value", "low", "high", "n", "unit", "protocol"])
    for setting in found:
        for one in setting.figures:
            estimate = one.estimate
            values = (one.name, estimate.value, estimate.low, estimate.high, estimate.n, one.unit, one.protocol_digest)
            writer.writerow([*setting.chosen.values(), *values])
    write_file(folder / TABLE, buffer.getvalue().encode())
    write_file(folder / PLOT, plot(found).encode())


def plot(found: Sequence[Setting]) -> str:
    """Return quality against cost as SVG, a plot for each figure of quality.

    A line joins settings that differ in steps alone.
    """
    names = dict.fromkeys(one.name for setting in found for one in setting.figures if not one.name.startswith("speed/"))
    charts = [chart for name in names if (chart := _chart(name, found))]
    placed = [f'<g transform="translate(0 {HEIGHT * row})">{chart}</g>' for row, chart in enumerate(charts)]
    height, width = HEIGHT * max(1, len(charts)), WIDTH + LEGEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(placed) + "\n</svg>\n"
    )


def _chart(name: str, found: Sequence[Setting]) -> str:
    points = [(one, setting) for setting in found for one in setting.figures if one.name == name]
    points = [(one, setting) for one, setting in points if math.isfinite(one.estimate.value) and setting.cost > 0]
    if not points:
        return ""
    costs = [math.log(setting.cost) for _, setting in points]
    ends = [end for one, _ in points for end in _ends(one)]
    across, up = _scale(costs, MARGIN, WIDTH - MARGIN), _scale(ends, HEIGHT - MARGIN, 24)
    parts = [_axes(points[0][0], any(not math.isnan(setting.value(COST)) for _, setting in points))]
    for value in (min(ends), max(ends)):
        parts.append(_text(MARGIN - 12, up(value) + 4, f"{value:.3g}", "end"))
    for value in sorted(set(costs)) if len(set(costs)) <= TICKS else (min(costs), max(costs)):
        parts.append(_text(across(value), HEIGHT - MARGIN + 22, f"{math.exp(value):.3g}", "middle"))
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for (one, setting), cost in zip(points, costs):
        low, high = _ends(one)
        lines.setdefault(setting.series, []).append((across(cost), up(one.estimate.value), up(low), up(high)))
    for number, (series, line) in enumerate(lines.items()):
        parts.append(_line(sorted(line), COLOURS[number % len(COLOURS)]))
        parts.append(f'<circle cx="{WIDTH}" cy="{26 + 16 * number}" r="3.5" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(_text(WIDTH + 8, 30 + 16 * number, series or "steps", "start"))
    return "".join(parts)


def _axes(figure: Figure, timed: bool) -> str:
    better = f" ({figure.better} is better)" if figure.better else ""
    bottom, unit = HEIGHT - MARGIN + 8, "seconds to a picture" if timed else "steps"
    return (
        f'<text x="{MARGIN}" y="14" fill="currentColor" font-weight="bold">{escape(figure.name)}{better}</text>'
        f'<path d="M{MARGIN - 8} 20V{bottom}H{WIDTH - 8}" fill="none" stroke="currentColor" opacity=".5"/>'
        + _text(WIDTH - 8, bottom + 28, f"{unit}, logarithmic", "end")
    )


def _line(points: Sequence[tuple[float, float, float, float]], colour: str) -> str:
    """Draw (x, y, low, high) of one series, from left to right."""
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    parts = [f'<polyline points="{way}" fill="none" stroke="{colour}"/>']
    for x, y, low, high in points:
        parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" opacity=".5"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="currentColor" text-anchor="{anchor}">{escape(text)}</text>'


def _ends(one: Figure) -> tuple[float, float]:
    """Return the interval, or the value twice where there is none."""
    found = one.estimate
    return (found.low, found.high) if math.isfinite(found.low + found.high) else (found.value, found.value)


def _scale(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """Return what places the smallest of some values at one end of a stretch and the largest at the other."""
    low, span = min(values), max(values) - min(values)
    return lambda value: first + (last - first) * ((value - low) / span if span else 0.5)
