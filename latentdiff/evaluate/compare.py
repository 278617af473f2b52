"""Two reports side by side: differences of figures whose protocols agree, and why others are not compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from latentdiff.errors import InputError, shown, suggest
from latentdiff.evaluate.figure import Figure, difference
from latentdiff.evaluate.intervals import Estimate, Paired, paired_difference
from latentdiff.generation.options import options_of
from latentdiff.generation.request import Settings

__all__ = ["ALONE", "Comparison", "compare", "comparison_lines"]

ALONE = ("only in A", "only in B")


@dataclass(frozen=True)
class Comparison:
    """A figure in two reports, A and B.

    Attributes:
        name: of the figure.
        refused: why its values are not compared; empty where they are.
        first, second: its estimates in A and B; None where there is none.
        difference: B less A, with its interval; None where refused.
        paired: whether that is of differences picture by picture.
        verdict: "better", "worse" or "different" where the interval leaves out 0, else "no difference shown".
    """

    name: str
    refused: str = ""
    first: Estimate | None = None
    second: Estimate | None = None
    difference: Estimate | None = None
    paired: bool = False
    verdict: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it, what is not a number as null."""
        return _finite(asdict(self))


def compare(first: Sequence[Figure], second: Sequence[Figure], across: Sequence[str] = ()) -> list[Comparison]:
    """Return every figure of two reports, compared or refused.

    Args:
        across: generation settings that may differ, because it is they that are compared.

    Raises:
        InputError: one of `across` is no generation setting.
    """
    for name in across:
        if name not in options_of(Settings):
            raise InputError(f"--across {shown(name)} is no generation setting{suggest(name, options_of(Settings))}")
    found, left = [], list(second)
    for one in first:
        others = [other for other in left if other.name == one.name]
        if not others:
            found.append(Comparison(one.name, ALONE[0]))
            continue
        other = min(others, key=lambda other: len(_apart(one, other, across)))
        left.remove(other)
        apart = _apart(one, other, across)
        found.append(Comparison(one.name, apart) if apart else _compared(one, other))
    return found + [Comparison(other.name, ALONE[1]) for other in left]


def _apart(first: Figure, second: Figure, across: Sequence[str]) -> str:
    kept = [{name: value for name, value in one.protocol.items() if name not in across} for one in (first, second)]
    return difference(*kept)


def _compared(first: Figure, second: Figure) -> Comparison:
    paired = bool(first.items) and first.items.keys() == second.items.keys()
    if paired:
        both = [(value, second.items[name]) for name, value in first.items.items()]
        found = paired_difference(*zip(*(pair for pair in both if math.isfinite(sum(pair)))))
    else:
        found = Paired(_independent(first.estimate, second.estimate))
    verdict = "no difference shown"
    if found.differs:
        lower = found.difference.value < 0
        verdict = "different" if first.better is None else "better" if lower == (first.better == "lower") else "worse"
    return Comparison(first.name, "", first.estimate, second.estimate, found.difference, paired, verdict)


def _independent(first: Estimate, second: Estimate) -> Estimate:
    """Return second - first of two independent estimates, its interval from how far each lies from its own limits.

    Source: Newcombe 1998, Statistics in Medicine 17, method 10; for other estimates, Zou and Donner 2008,
    Statistics in Medicine 27.
    """
    value = second.value - first.value
    below = math.hypot(second.value - second.low, first.high - first.value)
    above = math.hypot(second.high - second.value, first.value - first.low)
    return Estimate(value, value - below, value + above, min(first.n, second.n))


def comparison_lines(found: Sequence[Comparison]) -> Iterator[str]:
    """Yield a table: name, A, B, difference, verdict; and after it what is not compared and why."""
    rows = [("figure", "A", "B", "B - A", "")]
    for one in found:
        if one.difference is not None:
            how = "paired" if one.paired else "unpaired"
            rows.append((one.name, str(one.first), str(one.second), f"{one.difference} {how}", f"B {_said(one)}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    if len(rows) > 1:
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for one in found:
        if one.refused and one.refused not in ALONE:
            yield f"{one.name}: not compared: {one.refused}"
    for side in ALONE:
        if names := [one.name for one in found if one.refused == side]:
            yield f"{side}: {', '.join(names)}"


def _said(one: Comparison) -> str:
    return f"is {one.verdict}" if one.verdict in ("better", "worse", "different") else "shows no difference"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
