"""Curves of a run's log as SVG."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

Points = Sequence[tuple[int, float]]
"""Step and value, in the order of the steps."""

WIDTH, HEIGHT, MARGIN = 420, 220, 52  # of a plot, in pixels
COLOUR = "#2f7ed8"


def read_scalars(run: Path, *names: str) -> dict[str, Points]:
    """Return what the log of a run has of some values; those that it lacks are left out."""
    logs = run / "logs"
    if not logs.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every run that was gone on with
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    there = events.Tags()["scalars"]
    found = {name: [(one.step, one.value) for one in events.Scalars(name)] for name in names if name in there}
    return {name: [point for point in points if math.isfinite(point[1])] for name, points in found.items()}


def curve(title: str, points: Points) -> str:
    """Return a value against steps as SVG; nothing where there are less than two."""
    if len(points) < 2:
        return ""
    steps, values = [step for step, _ in points], [value for _, value in points]
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    across, up = (right - left) or 1, (high - low) or 1.0
    width, height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    way = " ".join(
        f"{MARGIN + width * (step - left) / across:.1f},{HEIGHT - MARGIN - height * (value - low) / up:.1f}"
        for step, value in points
    )
    bottom = HEIGHT - MARGIN + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-size="11">{_text(MARGIN, 20, title, "start")}'
        f'<path d="M{MARGIN - 8} {MARGIN - 8}V{bottom}H{WIDTH - MARGIN + 8}" fill="none" stroke="currentColor" '
        f'opacity=".5"/><polyline points="{way}" fill="none" stroke="{COLOUR}" stroke-width="1.5"/>'
        f"{_text(MARGIN - 12, MARGIN + 4, f'{high:.3g}', 'end')}"
        f"{_text(MARGIN - 12, HEIGHT - MARGIN + 4, f'{low:.3g}', 'end')}"
        f"{_text(MARGIN, bottom + 16, f'{left}', 'middle')}"
        f"{_text(WIDTH - MARGIN, bottom + 16, f'{right} steps', 'middle')}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" fill="currentColor" text-anchor="{anchor}">{escape(text)}</text>'
