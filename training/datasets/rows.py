"""The rows of metadata of a set that this package built."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError
from latentdiff.files import read_file, write_file

METADATA, MOST_BYTES = "metadata.jsonl", 2**30


def read_rows(split: Path) -> list[dict[str, Any]]:
    """Return the rows of the folder of a split.

    Raises:
        InputError: the file cannot be read, or a line of it is no JSON object with captions.
    """
    file = split / METADATA
    data = read_file(file, MOST_BYTES)
    try:
        rows = [json.loads(line) for line in data.decode().splitlines()]
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}; build the set again") from error
    if not all(isinstance(row, dict) and isinstance(row.get("captions"), list) for row in rows):
        raise InputError(f"{file} has rows without captions; name a folder of `latentdiff data emoji`")
    return rows


def write_rows(split: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of the folder of a split.

    Raises:
        StorageError: the file cannot be written.
    """
    write_file(split / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
