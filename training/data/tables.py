"""Tables of pictures and captions as text: JSON lines and CSV, and which of their columns is which."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError, shown
from latentdiff.files import parse_json, read_file

# How the columns are called where the config does not say.
IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "file", "path", "image_path", "jpg", "png", "webp")
CAPTION_COLUMNS = ("captions", "text", "caption", "texts", "prompt", "description")
SURPLUS = "(cells beyond the last column)"  # of a CSV row, as an unquoted comma makes them
SEPARATORS = (",", ";", "\t")  # of CSV; where the header has as many of two, it is the first
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
MAX_TABLE_BYTES = 2**29
MAX_ROW_CHARACTERS = 2**25


def read_table(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl, .csv or .tsv file.

    Raises:
        InputError: it cannot be read, or is not well-formed.
    """
    text = decode_text(read_file(file, MAX_TABLE_BYTES, "table"), str(file))
    return _json_lines(text, str(file)) if file.suffix.lower() == ".jsonl" else _csv(text, file)


def decode_text(data: bytes, name: str) -> str:
    """Return text in UTF-8, with its mark or without, or in UTF-16 with its mark.

    Raises:
        InputError: it is in something else.
    """
    if not data.startswith(UTF_16) and b"\0" in data[:1000]:
        raise InputError(f"{name} holds NUL bytes, as UTF-16 without its mark does; save it as UTF-8")
    try:
        return data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data[: error.start].count(b"\n") + 1, data[error.start]
        raise InputError(
            f"{name}:{line} is not UTF-8 (byte 0x{byte:02x}), perhaps Windows-1252 or Latin-1; save it as UTF-8"
        ) from error


def column(kind: str, chosen: str | None, rows: Sequence[dict[str, Any]], usual: Sequence[str], place: str) -> str:
    """Return which column holds the pictures or captions: the one chosen, or the only one with a usual name.

    Args:
        kind: "image" or "caption".
        chosen: by the config.
        rows: of the table.
        usual: names of such columns.
        place: of the table, for messages.

    Raises:
        InputError: there is none, or more than one.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    there = ", ".join(shown(name, 40)[1:-1] for name in columns[:20])
    if chosen is not None:
        if chosen not in columns:
            raise InputError(
                f"{place} has no column {shown(chosen)} (data.{kind}_column); its columns are {there or '(none)'}"
            )
        return chosen
    found = [name for name in columns if name in usual or name.lower() in usual]
    if len(found) != 1:
        problem = f"{' and '.join(found)} may all be the {kind}" if found else f"no column looks like the {kind}"
        raise InputError(f"{place}: {problem}; set data.{kind}_column to one of its columns: {there or '(none)'}")
    return found[0]


def _csv(text: str, file: Path) -> list[dict[str, Any]]:
    header = text.partition("\n")[0]
    separator = "\t" if file.suffix.lower() == ".tsv" else max(SEPARATORS, key=header.count)
    limit = csv.field_size_limit(2**30)  # a caption that is too long is one bad row, no bad file
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restkey=SURPLUS, strict=True)
    rows, line = [], 1
    try:
        for row in reader:
            rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "a quotation mark is not closed" if "unexpected end" in str(error) else str(error)
        raise InputError(f"{file}:{line} is not CSV that can be read: {reason}; mend that row") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _json_lines(text: str, name: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(line) > MAX_ROW_CHARACTERS:
            raise InputError(f"{name}:{number} has {len(line):,} characters; each line is one object, of one picture")
        row = parse_json(line, f"{name}:{number}")
        if not isinstance(row, dict):
            raise InputError(f"{name}:{number} must be an object, got {type(row).__name__}")
        rows.append(row)
    return rows
