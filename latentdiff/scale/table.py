"""Tables of what to draw: text, JSON lines, CSV and parquet, here or behind a URL, read row by row.

Nothing of a table is kept in memory but the rows that are being looked at, so it may be of any length.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from latentdiff.errors import InputError, MissingDependencyError, shown
from latentdiff.files import open_file

__all__ = ["Table", "open_table", "place_in"]

SEPARATORS = (",", ";", "\t")  # of CSV; where the header has as many of two, it is the first
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
MAX_LINE = 2**25  # characters
ROWS_AT_ONCE = 8192  # of a parquet file
SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # as json.scanner has it

Cells = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of what to draw.

    Attributes:
        place: path or URL of its file.
        kind: a key of `KINDS`.
    """

    place: str
    kind: str

    def rows(self) -> Iterator[Cells]:
        """Yield the rows from the first on, each as its cells by column; may be called again.

        Raises:
            InputError: the file cannot be read, or is not well-formed.
        """
        with _opened(self.place) as file:
            try:
                yield from KINDS[self.kind](file, self.place)
            except UnicodeDecodeError as error:
                raise InputError(f"{_told(self.place)} is not UTF-8 ({error.reason}); save it as UTF-8") from error
            except OSError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{_told(self.place)} cannot be read ({error}); check it") from error


def open_table(place: str) -> Table:
    """Return the table in a file.

    Args:
        place: path or URL; what it ends in says how it is read.

    Raises:
        InputError: there is no such file, or it ends in something else.
    """
    kind = f".{place.partition('?')[0].rpartition('.')[2].lower()}"
    if kind not in KINDS:
        names = ", ".join(KINDS)
        raise InputError(f"PROMPTS must be a file in {names}, got {shown(_told(place))}; name it after what it is")
    with _opened(place):
        return Table(place, kind)


def place_in(table: str, name: str) -> str:
    """Return the path or URL of a file that a table names: relative to the table, unless it is whole."""
    if "://" in name or Path(name).is_absolute():
        return name
    if "://" in table:
        return f"{table.partition('?')[0].rpartition('/')[0]}/{name}"
    return str(Path(table).parent / name)


def _told(place: str) -> str:
    """Return a path or URL for messages, without what may be a password or signature."""
    if "://" not in place:
        return place
    scheme, _, rest = place.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _opened(place: str) -> BinaryIO:
    if "://" not in place:
        return open_file(place, "table")
    import fsspec

    try:
        return fsspec.open(place, "rb").open()
    except ImportError as error:
        raise MissingDependencyError(f"{_told(place)} needs another package: {error}") from error
    except Exception as error:  # each kind of file system fails in ways of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"table {shown(_told(place), 200)} cannot be read ({reason}); check the address") from error


def _lines(file: BinaryIO) -> io.TextIOWrapper:
    """Return the text of a file in UTF-8, with its mark or without, or in UTF-16 with its mark."""
    start = file.read(2)
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-16" if start in UTF_16 else "utf-8-sig", newline="")


def _text(file: BinaryIO, place: str) -> Iterator[Cells]:
    with _lines(file) as text:
        for line in text:
            if prompt := line.strip():
                yield {"prompt": prompt}


def _json_lines(file: BinaryIO, place: str) -> Iterator[Cells]:
    with _lines(file) as text:
        for number, line in enumerate(text, 1):
            if line.isspace():
                continue
            try:
                row = _parsed(line) if len(line) <= MAX_LINE else None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{_told(place)}:{number} is not JSON ({error}); mend that line") from error
            if not isinstance(row, dict):
                raise InputError(f"{_told(place)}:{number} must be an object of one row, got another; mend that line")
            yield row


def _parsed(line: str) -> Any:
    """Return what `json.loads` does, without what takes most of its time; there are millions of lines."""
    try:
        row, end = SCAN(line, 0)
    except StopIteration:
        return json.loads(line)
    return json.loads(line) if line[end:].strip() else row


def _csv(file: BinaryIO, place: str) -> Iterator[Cells]:
    with _lines(file) as text:
        yield from _csv_rows(text, place)


def _csv_rows(text: io.TextIOWrapper, place: str) -> Iterator[Cells]:
    header = text.readline()
    separator = "\t" if place.partition("?")[0].lower().endswith(".tsv") else max(SEPARATORS, key=header.count)
    names = next(csv.reader([header], delimiter=separator), [])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{_told(place)}:1 must name each column once, got {shown(twice)} twice; rename one")
    reader = csv.reader(text, delimiter=separator, strict=True)
    try:
        for cells in reader:
            if len(cells) > len(names):
                raise InputError(
                    f"{_told(place)}:{reader.line_num + 1} must have {len(names)} cells as the first line, got "
                    f"{len(cells)}; put text with a {shown(separator)} in it into quotation marks"
                )
            if cells:
                yield dict(zip(names, cells))
    except csv.Error as error:
        raise InputError(f"{_told(place)}:{reader.line_num + 1} is not CSV ({error}); mend that row") from error


def _parquet(file: BinaryIO, place: str) -> Iterator[Cells]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{_told(place)} is not parquet that can be read ({error}); write it again") from error


KINDS: dict[str, Callable[[BinaryIO, str], Iterator[Cells]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
