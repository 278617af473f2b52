"""Captioned pictures in one small random-access form, wherever they are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError
from latentdiff.files import is_file, is_folder, read_file
from latentdiff.images import MAX_FILE_BYTES

from .image_info import ImageInfo
from .shards import PICTURES


class MissingSplitError(InputError):
    """The source can be read and has no split of the name asked for."""


@dataclass(frozen=True)
class Source:
    """Captioned pictures, wherever they are kept.

    Attributes:
        place: what they are called in messages.
        rows: what is known of each; its captions are "captions": a list, or one string, if all is well.
        names: what each is called in messages.
        read: returns the encoded bytes of one by its number; raises OSError or ValueError.
        files: whose sizes and times tell whether the pictures are still those of an earlier run.
        findings: of each picture, where they were examined while they were found, as in remote shards.
        table: of a folder, which is to name all pictures in it; None of other kinds.
        uncaptioned: whether the captions are empty because nothing says what any of the pictures shows.
    """

    place: str
    rows: Sequence[dict[str, Any]]
    names: Sequence[str]
    read: Callable[[int], bytes]
    files: Sequence[Path]
    findings: Sequence[ImageInfo | str] | None = None
    table: Path | None = None
    uncaptioned: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, numbers: Sequence[int]) -> Source:
        """Return only the pictures with these numbers."""
        rows, names = [self.rows[n] for n in numbers], [self.names[n] for n in numbers]
        findings = self.findings and [self.findings[n] for n in numbers]
        read = partial(_read_of_subset, self.read, numbers)
        return replace(self, rows=rows, names=names, read=read, findings=findings)


def of_paths(place: str, rows: Sequence[dict[str, Any]], paths: Sequence[Any], base: Path) -> Source:
    """Return a source of pictures that a table names by their paths, relative to a folder."""
    paths = [_as_here(path, base) for path in paths]
    files = [base / path for path in paths if isinstance(path, str)]
    names = [str(path or f"row {number}") for number, path in enumerate(paths)]
    return Source(place, rows, names, partial(read_cell, paths, [base]), files)


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures in a folder, by their names; files that a system hides are none, such as macOS's ._fox.png.

    Raises:
        InputError: the folder cannot be read.
    """
    return files_in(folder, *PICTURES)


def files_in(folder: Path, *kinds: str) -> list[Path]:
    """Return the files of some kinds in a folder, by their names; none where there is no folder.

    Raises:
        InputError: the folder cannot be read.
    """
    if not is_folder(folder):
        return []
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); check its rights") from error
    suffixes = tuple(f".{kind}" for kind in kinds)
    return sorted(folder / name for name in names if name.lower().endswith(suffixes) and not name.startswith("."))


# What reads a picture by its number; functions of a module, as they go to other processes.


def read_cell(cells: Sequence[Any], bases: Sequence[Path], index: int, column: str | None = None) -> bytes:
    """Return the encoded picture that a cell holds or names.

    Args:
        cells: of a column, or of the rows of a table.
        bases: folders that it may lie in, the first the one that paths are relative to.
        index: of the cell.
        column: of a table.

    Raises:
        OSError, ValueError: there is none, it lies elsewhere or cannot be read.
    """
    value = cells[index] if column is None else cells[index][column]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("no picture")
    if not any(_is_inside(bases[0] / value, base) for base in bases):
        raise ValueError("lies outside of the data set; put the table above all its pictures")
    try:
        return read_file(bases[0] / value, MAX_FILE_BYTES, "picture")
    except InputError as error:
        if (cause := error.__cause__) is None:
            raise
        raise ValueError(f"cannot be read ({getattr(cause, 'strerror', None) or cause})") from error


def _read_of_subset(read: Callable[[int], bytes], numbers: Sequence[int], index: int) -> bytes:
    return read(numbers[index])


def _is_inside(path: Path, base: Path) -> bool:
    """Say whether a path leads into a folder; links are not followed, as they are the owner's."""
    return Path(os.path.abspath(base)) in Path(os.path.abspath(path)).parents


def _as_here(path: object, base: Path) -> Any:
    r"""Return a path of a table with slashes where it was written with backslashes, as in images\fox.png."""
    if os.sep == "/" and isinstance(path, str) and "\\" in path and not is_file(base / path):
        return path.replace("\\", "/")
    return path
