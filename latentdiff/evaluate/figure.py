"""Figures that carry their protocol: what was measured, on what, by what; and their comparison."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from latentdiff.errors import InputError, shown
from latentdiff.evaluate.intervals import Estimate

__all__ = ["Figure", "Protocol", "difference", "digest_of", "read_figures"]

Protocol = Mapping[str, str | int | float | None]
"""Everything that a value depends on besides the model: data, split, n, seed, sampler, features, ..."""


@dataclass(frozen=True)
class Figure:
    """A measured value.

    Attributes:
        name: of the metric, "fid", or with what it is of, "compose/color".
        estimate: value, its 95 % interval, and of how many pictures.
        better: which values are better; None where neither is.
        protocol: what it depends on; values of different protocols must not be compared.
        floor: the same of real pictures against real ones: as good as it can get; None where there is no such thing.
        ceiling: the same of damaged real pictures, so that the distance between can be read.
        items: values picture by picture, by the name of each, where there are such: what paired differences are of.
        pictures: where the pictures of the items are, by the same names, from the folder of the report or of the
            pictures that were given.
        unit: what it is counted in, such as "dB"; empty for a number without one.
    """

    name: str
    estimate: Estimate
    better: Literal["lower", "higher"] | None
    protocol: Protocol
    floor: float | None = None
    ceiling: float | None = None
    items: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""

    @property
    def protocol_digest(self) -> str:
        """Eight hexadecimal digits that tell protocols apart."""
        return digest_of(self.protocol)

    def to_json(self) -> dict[str, Any]:
        """Return the figure as JSON has it; values that are not finite as null."""
        return _jsonable(asdict(self))

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Figure:
        """Return the figure that `to_json` wrote.

        Raises:
            InputError: it is not such a one.
        """
        try:
            estimate = Estimate(**{**_numbers(tree["estimate"]), "n": int(tree["estimate"]["n"])})  # type: ignore[arg-type]
            items, pictures = _numbers(tree.get("items", {})), {**tree.get("pictures", {})}
            own = {"estimate": estimate, "protocol": {**tree["protocol"]}, "items": items, "pictures": pictures}
            return cls(**{**tree, **own})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"a figure of a report cannot be read ({shown(str(error))}); evaluate again") from error


def digest_of(tree: Mapping[str, object]) -> str:
    """Return eight hexadecimal digits of a JSON tree, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def read_figures(tree: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of a report.

    Raises:
        InputError: it is no report.
    """
    figures = tree.get("figures")
    if not isinstance(figures, list) or not all(isinstance(one, Mapping) for one in figures):
        raise InputError("a report has a list of figures, got none; pass the report.json of latentdiff evaluate")
    return [Figure.from_json(one) for one in figures]


def difference(first: Protocol, second: Protocol) -> str:
    """Say in what two protocols differ, as "n 1000 against 500; seed 0 against 1"; empty where they agree."""
    names = dict.fromkeys([*first, *second])
    apart = [name for name in names if first.get(name) != second.get(name)]
    return "; ".join(f"{name} {first.get(name, 'none')} against {second.get(name, 'none')}" for name in apart)


def _numbers(tree: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in tree.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
