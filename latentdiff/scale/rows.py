"""Rows of a table as what is to be drawn: which columns there are, what their cells mean, what a picture is named.

A picture is a function of its row and of what draws it (`Maker`), and its name is the hash of both. What cannot be used
is not refused here but when it is drawn, so that one bad row fails alone; its name is that of its cells as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, NamedTuple

from latentdiff.errors import InputError, shown, suggest
from latentdiff.files import fingerprint, open_file
from latentdiff.generation.options import options_of
from latentdiff.generation.request import MAX_IMAGES, MAX_SEED, Settings
from latentdiff.scale.table import Cells, Table, place_in

__all__ = ["Columns", "Maker", "Row", "read_rows"]

NAMING = 1  # changes where equal rows would get pictures of another name
DIGITS = 32  # of a name, hexadecimal
INPUTS = ("image", "mask", "lora")
ID = "id"  # a column that is always kept
BETWEEN_LORAS = "|"
# Those whose default is not the same for every row: a model's own, or another where there is an image.
OPTIONS = options_of(Settings)
UNSETTLED = {"strength", *(name for name, declared in OPTIONS.items() if declared.from_model)}
DEFAULTS = {item.name: item.default for item in fields(Settings)}
TYPES = {item.name: str(item.type).partition(" ")[0] for item in fields(Settings)}
EXACTLY = {name: {"int": int, "str": str, "bool": bool}.get(kind) for name, kind in TYPES.items()}
MOST_KINDS = 1000  # of sets of columns that are remembered, as rows of JSON may leave any of them out
NOTHING: Mapping[str, Any] = {}
WRITER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str)
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Row(NamedTuple):
    """A picture that is to be drawn.

    Attributes:
        number: of its row in the table, from 1.
        copy: which of the row's `num_images` it is, from 0.
        prompt: what it is to show.
        settings: arguments of `Pipeline.__call__`, as far as they are given.
        image, mask: path or URL; a mask may also be "alpha" or a box.
        loras: files with one weight or two.
        kept: cells that are written beside the picture and mean nothing.
    """

    number: int
    copy: int
    prompt: Any
    settings: Mapping[str, Any]
    image: Any = None
    mask: Any = None
    loras: tuple[tuple[str, tuple[float, ...]], ...] = ()
    kept: Mapping[str, Any] = NOTHING


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called, and which are kept."""

    kept: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, str]:
        """Return what each column that has a meaning stands for: a setting, by its name or as its flag is called."""
        found = {name: name for name in ("prompt", *OPTIONS, *INPUTS)} | {"size": "size"}
        for name, declared in OPTIONS.items():
            for flag in (declared.flag or "").split(", "):
                if flag.startswith("--"):
                    found.setdefault(flag[2:].replace("-", "_"), name)
        return found


@dataclass(frozen=True)
class Maker:
    """What draws the pictures, as far as they depend on it.

    Attributes:
        facts: hash of the model and what else changes pictures of equal rows, JSON-ready.
        defaults: settings of rows that do not say otherwise.
        loras: of rows that name none.
    """

    facts: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def namer(self) -> Callable[[Row], str]:
        """Return the function that names pictures."""
        start = hashlib.sha256(_rendered({"naming": NAMING, **self.facts}).encode())
        hashed = lru_cache(maxsize=10_000)(file_hash)  # a file is read once, though many rows name it

        def name(row: Row) -> str:
            settings = row.settings
            tree = {key: settings[key] for key in settings if key in UNSETTLED or settings[key] != DEFAULTS[key]}
            tree["prompt"] = row.prompt
            if row.image is not None:
                tree["image"] = hashed(str(row.image))
            if row.mask is not None:
                tree["mask"] = row.mask if _is_shape(row.mask) else hashed(str(row.mask))
            if row.loras:
                tree["loras"] = [[hashed(file), weights] for file, weights in row.loras]
            digest = start.copy()
            digest.update(_rendered(tree).encode())
            return digest.hexdigest()[:DIGITS]

        return name


def read_rows(table: Table, maker: Maker, columns: Columns) -> Iterator[Row]:
    """Yield the pictures that a table asks for, in order.

    Raises:
        InputError: the table cannot be read, or has a column that is not known.
    """
    names, kept = columns.names, {ID, *columns.kept}
    plain: dict[tuple[str, ...], list[tuple[str, str]] | None] = {}  # of the columns of a row, where all are settings
    for number, cells in enumerate(table.rows(), 1):
        key = tuple(cells)
        if key not in plain:
            if len(plain) > MOST_KINDS:
                plain.clear()
            plain[key] = _plain_columns(number, cells, names, kept)
        columns_of = plain[key]
        if columns_of is None or "num_images" in maker.defaults:
            yield from _pictures_of(number, cells, table.place, maker, names, kept)
            continue
        settings, prompt = dict(maker.defaults), "" if _is_missing(cells["prompt"]) else cells["prompt"]
        for column, name in columns_of:
            if not _is_missing(raw := cells[column]):
                settings[name] = raw if type(raw) is EXACTLY.get(name) else _value(name, raw)
        yield Row(number, 0, prompt, settings, None, None, maker.loras)


def _plain_columns(number: int, cells: Cells, names: Mapping[str, str], kept: set[str]) -> list[tuple[str, str]] | None:
    """Return columns with the settings that they stand for, besides a prompt; None where there is more in a row.

    Raises:
        InputError: one is not known.
    """
    for other in cells:
        if other not in names and other not in kept:
            near = suggest(str(other)[:80], names)
            near = near if "did you mean" in near else ""
            raise InputError(
                f"row {number} has a column {shown(other)}, which is no setting{near}; "
                f"--keep {str(other)[:80]} writes it beside the picture"
            )
    meant = [names[column] for column in cells if column in names]
    if len(set(meant)) < len(meant):
        twice = next(name for name in meant if meant.count(name) > 1)
        raise InputError(f"row {number} must say {twice} once, got it in two columns; leave one of them out")
    special = {*INPUTS, "size", "num_images"}
    if "prompt" not in cells or any(column not in names or names[column] in special for column in cells):
        return None
    return [(column, names[column]) for column in cells if column != "prompt"]


def _pictures_of(
    number: int, cells: Cells, place: str, maker: Maker, names: Mapping[str, str], kept: set[str]
) -> Iterator[Row]:
    """Yield the pictures of one row: `num_images` of them."""
    settings, inputs = dict(maker.defaults), dict[str, Any]()
    prompt: Any = settings.pop("prompt", "")
    for column, raw in cells.items():
        if _is_missing(raw) or column not in names:
            continue
        name = names[column]
        if name == "prompt":
            prompt = raw
        elif name in INPUTS:
            inputs[name] = raw
        elif name == "size":
            settings |= _size(raw)
        else:
            settings[name] = _value(name, raw)
    loras = _loras(inputs["lora"], place) if "lora" in inputs else maker.loras
    own = {name: cells[name] for name in cells if name in kept and name not in names}
    image = place_in(place, inputs["image"]) if isinstance(inputs.get("image"), str) else inputs.get("image")
    mask = _mask(inputs.get("mask"), place)
    count = settings.pop("num_images", 1)
    if type(count) is not int or not 1 <= count <= MAX_IMAGES:
        settings["num_images"], count = count, 1  # which is refused when it is drawn
    for copy in range(count):
        yield Row(number, copy, prompt, _with_seed(settings, copy), image, mask, loras, own)


def _with_seed(settings: Mapping[str, Any], copy: int) -> dict[str, Any]:
    """Return the settings of one of several pictures: the seed, or else the variation's, goes up."""
    name = "variation_seed" if settings.get("variation_strength") else "seed"
    first = settings.get(name, 0)
    if not copy or type(first) is not int or first + copy > MAX_SEED:
        return dict(settings)
    return {**settings, name: first + copy}


def _is_missing(cell: object) -> bool:
    """Say whether a cell says nothing: an empty one, or a number that is none, as pandas fills gaps."""
    return cell is None or cell == "" or (type(cell) is float and math.isnan(cell))


def _value(name: str, raw: Any) -> Any:
    """Return the value of a setting from a cell; what cannot be read stays as it is."""
    kind, declared = TYPES[name], OPTIONS[name]
    if isinstance(raw, str) and kind != "str":
        try:
            if declared.parse is not None:
                raw = declared.parse(raw)
            elif kind == "bool":
                raw = TRUTHS.get(raw.strip().lower(), raw)
            else:
                raw = int(raw) if kind == "int" and raw.strip().lstrip("-").isdecimal() else float(raw)
        except (ValueError, InputError):
            return raw
    if kind == "int" and isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if kind == "float" and type(raw) is int and abs(raw) < 2**53:
        return float(raw)
    if isinstance(raw, list):
        return tuple(float(one) if kind == "tuple[float," and type(one) is int else one for one in raw)
    return raw


def _size(raw: Any) -> dict[str, Any]:
    """Return width and height of "64x48"; what cannot be read is refused when it is drawn."""
    width, _, height = str(raw).lower().partition("x")
    whole = all(side.strip().isdecimal() and len(side) < 9 for side in (width, height))
    return {"width": int(width), "height": int(height)} if whole else {"width": raw}


def _mask(raw: Any, place: str) -> Any:
    if not isinstance(raw, str) or raw == "alpha":
        return raw
    numbers = raw.split(",")
    if len(numbers) == 4 and all(number.strip().isdecimal() and len(number) < 9 for number in numbers):
        return [int(number) for number in numbers]
    return place_in(place, raw)


def _is_shape(mask: object) -> bool:
    return mask == "alpha" or not isinstance(mask, str)


def _loras(raw: Any, place: str) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Return files and weights of "a.safetensors:0.8|b.safetensors", a list of such texts, or {file: weight}."""
    if isinstance(raw, Mapping):
        given = [(str(file), weight) for file, weight in raw.items()]
        pairs = [(file, tuple(weight) if isinstance(weight, Sequence) else (weight,)) for file, weight in given]
    else:
        texts = raw.split(BETWEEN_LORAS) if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
        pairs = [_file_and_weights(str(text).strip()) for text in texts]
    return tuple((place_in(place, file), weights) for file, weights in pairs)


def _file_and_weights(text: str) -> tuple[str, tuple[float, ...]]:
    file, _, rest = text.rpartition(":")
    try:
        return (file, tuple(float(number) for number in rest.split(","))) if file else (text, (1.0,))
    except ValueError:
        return text, (1.0,)


def file_hash(place: str) -> str | None:
    """Return the SHA-256 of a file that a row names; None where it cannot be read, which fails when it is drawn."""
    try:
        if "://" in place:
            import fsspec

            file = fsspec.open(place, "rb").open()
        else:
            file = open_file(place)
        with file:
            return fingerprint(file)[1]
    except Exception:  # each kind of file system fails in ways of its own
        return None


def _rendered(tree: Mapping[str, Any]) -> str:
    """Return JSON in one form alone: sorted, without spaces, in ASCII.

    What most rows have goes by a short way, as there are millions of them.
    """
    return "{" + ",".join([f"{_quoted(name)}:{_written(tree[name])}" for name in sorted(tree)]) + "}"


def _written(value: Any) -> str:
    kind = type(value)
    if kind is str:
        return _quoted(value)
    return int.__repr__(value) if kind is int else WRITER.encode(value)
