"""Generation options: the checks they are made of, and the form in which each is declared once.

An option is a field of `generation.request.Settings`, made by `option`. The check, the command line, the signature and
the documentation of `Pipeline.__call__`, and what a picture records are derived from it.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, SupportsIndex

from latentdiff.errors import InputError, shown, suggest
from latentdiff.prompts import check_prompt

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["BOTH", "GENERATE", "SIDES", "SIZE_MULTIPLE", "UPSCALE", "Option", "option", "options_of"]

MAX_SIDE = 16384
MAX_LEVELS = 1001  # noise levels of 1000 steps, the last one 0
SIZE_MULTIPLE = 8  # of height and width, or the autoencoder's factor where that is more
SIDES = ("left", "top", "right", "bottom")

GENERATE = ("text_to_image", "inpaint")
UPSCALE = ("upscale",)
BOTH = (*GENERATE, *UPSCALE)

Check = Callable[[str, Any], Any]
"""(name, value) -> the value as it is kept; raises InputError."""


@dataclass(frozen=True)
class Option:
    """A generation option, declared as a field of `Settings`.

    Attributes:
        check: of the value.
        help: one or two lines, for every door.
        flag: on the command line; None where that has another form for it.
        metavar: of the value on the command line; None for the type's.
        parse: the value from its text on the command line.
        tasks: of the models it is for.
        since: version of the records that have it: 1 for those every record must have, 2 for later ones.
        needs: another option without which it says nothing, and what it says with it.
        from_model: whether a model may have a default of its own.
    """

    check: Check
    help: str
    flag: str | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    tasks: tuple[str, ...] = BOTH
    since: int = 2
    needs: tuple[str, str] | None = None
    from_model: bool = False


def option(default: object, check: Check, text: str, **more: Any) -> Any:
    """Declare a field of `Settings`; see `Option`."""
    return field(default=default, metadata={"option": Option(check, text, **more)})


def options_of(settings: DataclassInstance | type[DataclassInstance]) -> dict[str, Option]:
    """Return the options of `Settings` by name, in the order of their declaration."""
    return {item.name: item.metadata["option"] for item in fields(settings) if "option" in item.metadata}


def number(low: float, high: float, remedy: str) -> Check:
    """Return the check of a finite number within [low, high]."""
    return lambda name, value: check_number(name, value, low, high, remedy)


def integer(low: int, high: int, remedy: str) -> Check:
    """Return the check of a whole number within [low, high]."""
    return lambda name, value: check_integer(name, value, low, high, remedy)


def optional(check: Check) -> Check:
    """Return a check that lets None pass."""
    return lambda name, value: None if value is None else check(name, value)


def one_of(choices: Sequence[Any], remedy: str = "") -> Check:
    """Return the check of a value among a few."""
    expected = " or ".join(map(str, choices))

    def check(name: str, value: object) -> Any:
        known = isinstance(value, (str, int)) and not isinstance(value, bool) and value in choices
        if known:
            return value
        if all(isinstance(choice, str) for choice in choices):
            raise InputError(f"{name} {shown(value)} is unknown{suggest(str(value)[:80], choices)}")
        raise InputError(f"{name} must be {expected}, got {shown(value)}; {remedy}")

    return check


def text(name: str, value: object) -> str:
    """Check a text that may be empty."""
    return check_prompt(value, what=name, allow_empty=True)


def flag(name: str, value: object) -> bool:
    """Check a yes or no."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {shown(value)}; leave it out")
    return value


def side(name: str, value: object) -> int:
    """Check a height or width in pixels."""
    return check_size(name, value, SIZE_MULTIPLE, MAX_SIDE)


def interval(name: str, value: object) -> tuple[float, float]:
    """Check two rising noise levels."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InputError(f"{name} must be two noise levels, got {shown(value)}; try (0.3, 5.0)")
    low, high = (check_number(name, one, 0, math.inf, "try (0.3, 5.0)") for one in value)
    if low >= high:
        raise InputError(f"{name} must rise, got {shown(value)}; try ({high:g}, {low:g})")
    return low, high


def falling(name: str, value: object) -> tuple[float, ...]:
    """Check falling numbers of at least 0, such as timesteps or noise levels; a model says how high they may start."""
    if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= MAX_LEVELS:
        got = f"{len(value)} of them" if isinstance(value, (tuple, list)) else shown(value)
        raise InputError(f"{name} must be 1 to {MAX_LEVELS} numbers that fall, got {got}; leave it out for even steps")
    levels = tuple(check_number(name, one, 0, math.inf, "leave it out for even steps") for one in value)
    for high, low in pairwise(levels):
        if high <= low:
            raise InputError(f"{name} must fall, got {high:g} and then {low:g}; sort them, each only once")
    return levels


def check_number(name: str, value: object, low: float, high: float, remedy: str) -> float:
    """Return `value`; raise InputError unless it is a finite number within [low, high]."""
    span = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
    try:
        converted = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted) or not low <= converted <= high:
        raise InputError(f"{name} must be a finite number {span}, got {shown(value)}; {remedy}")
    return converted


def check_integer(name: str, value: object, low: int, high: int, remedy: str) -> int:
    """Return `value`; raise InputError unless it is a whole number within [low, high]."""
    try:
        whole = operator.index(value) if isinstance(value, SupportsIndex) and not isinstance(value, bool) else None
    except (TypeError, ValueError, RuntimeError):  # of strings, arrays, tensors
        whole = None
    if whole is None or not low <= whole <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}; {remedy}")
    return whole


def check_size(name: str, value: object, multiple: int, limit: int) -> int:
    """Return `value` pixels; raise InputError unless they are a multiple of `multiple` up to `limit`."""
    pixels = check_integer(name, value, multiple, limit, f"choose a multiple of {multiple} up to {limit}")
    if pixels % multiple:
        below = pixels // multiple * multiple
        nearest = [str(near) for near in (below, below + multiple) if multiple <= near <= limit]
        raise InputError(f"{name} must be a multiple of {multiple}, got {pixels}; try {' or '.join(nearest)}")
    return pixels


def sides(name: str, value: object) -> tuple[int, int, int, int]:
    """Return pixels to the left, above, to the right and below, from names with numbers or four numbers."""
    if isinstance(value, Mapping):
        for key in value:
            if key not in SIDES:
                raise InputError(f"{name} has no side {shown(key)}{suggest(str(key)[:80], SIDES)}")
        value = [value.get(key, 0) for key in SIDES]
    if not isinstance(value, (tuple, list)) or len(value) != len(SIDES):
        raise InputError(f'{name} must be sides with pixels, got {shown(value)}; try {{"left": 16, "right": 16}}')
    left, top, right, bottom = (_pixels(f"{name} {key}", pixels) for key, pixels in zip(SIDES, value))
    if not left + top + right + bottom:
        raise InputError(f'{name} must add pixels on some side, got none; try {{"left": 16, "right": 16}}')
    return left, top, right, bottom


def _pixels(name: str, value: object) -> int:
    pixels = check_integer(name, value, 0, MAX_SIDE, "try 16")
    return check_size(name, pixels, SIZE_MULTIPLE, MAX_SIDE) if pixels else 0


def parse_numbers(value: str) -> tuple[float, ...] | str:
    """Return the numbers of "999,749,499,249"; other text as it is, for the check to refuse."""
    try:
        return tuple(map(float, value.split(",")))
    except ValueError:
        return value


def parse_pair(value: str) -> tuple[float, float] | str:
    """Return the numbers of "0.3,5"; other text as it is, for the check to refuse."""
    try:
        low, high = map(float, value.split(","))
    except ValueError:
        return value
    return low, high


def parse_sides(value: str) -> dict[str, int]:
    """Return the pixels of each side of "left=16,top=8"."""
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(equals and pixels.strip().isdecimal() and len(pixels) < 9 for _, equals, pixels in pairs):
        raise InputError(f"--outpaint must be sides with pixels, got {shown(value)}; try left=16,right=16")
    return {key.strip(): int(pixels) for key, _, pixels in pairs}
