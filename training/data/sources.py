"""Where captioned pictures come from: folders, tables and tar shards, all in one small random-access form."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError, suggest

from ..config import DataConfig
from .image_info import ImageInfo
from .remote import is_remote, shown
from .shards import PICTURES, Member, expand_braces, read_remote_shards, read_shards

# How the columns are called where the config does not say.
IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "file", "path", "image_path", "jpg", "png", "webp")
CAPTION_COLUMNS = ("captions", "text", "caption", "texts", "prompt", "description")
HUB = "hub:"
SURPLUS = "(cells beyond the last column)"  # of a CSV row, as an unquoted comma makes them
EXPECTED = (
    'an imagefolder (metadata.jsonl with "file_name" and "text"), a .csv, .jsonl, .parquet, .arrow or .tar file, a '
    "pattern of such files, the address of .tar files, or hub:owner/name"
)


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
    """

    place: str
    rows: Sequence[dict[str, Any]]
    names: Sequence[str]
    read: Callable[[int], bytes]
    files: Sequence[Path]
    findings: Sequence[ImageInfo | str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, numbers: Sequence[int]) -> Source:
        """Return only the pictures with these numbers."""
        rows, names = [self.rows[n] for n in numbers], [self.names[n] for n in numbers]
        findings = self.findings and [self.findings[n] for n in numbers]
        read = partial(_read_of_subset, self.read, numbers)
        return replace(self, rows=rows, names=names, read=read, findings=findings)


def open_source(config: DataConfig, split: str = "train", cache: Path | None = None) -> Source:
    """Return one split of the captioned pictures that a config names, without those that it does not keep.

    Splits are folders of that name (train, validation, test), or what `datasets` knows as such; what has none is all
    of it "train".

    Args:
        cache: folder of what is kept of remote shards; None keeps nothing.

    Raises:
        MissingSplitError: the source has no such split, or nothing in it that is kept.
        InputError: there is nothing of a known kind, a column is missing, or no picture is left.
        StorageError: remote shards cannot be read, or the cache cannot be written.
    """
    source = _open(config, split, cache)
    wanted = [number for number, row in enumerate(source.rows) if is_wanted(row, config)]
    if not source.rows:
        raise InputError(f"{source.place} is empty; add pictures")
    if not wanted:
        kind = InputError if split == "train" else MissingSplitError
        raise kind(f"{source.place}: no picture is left after data.keep and data.drop; loosen them")
    source = source if len(wanted) == len(source) else source.subset(wanted)
    return source if not config.captions else replace(source, rows=[{"captions": config.captions}] * len(source))


def _open(config: DataConfig, split: str, cache: Path | None) -> Source:
    if is_remote(config.folder):
        return _remote(config, split, cache)
    if config.folder.startswith(HUB):
        return _loaded(config, split, {"path": config.folder.removeprefix(HUB)})
    place = Path(config.folder)
    if (place / split / "metadata.jsonl").is_file():
        return _image_folder(place / split, config)
    if split == "train" and (place / "metadata.jsonl").is_file():
        return _image_folder(place, config)
    if shards := sorted((place / split).glob("*.tar")):
        return _shards(shards, config)
    if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        return _saved_dataset(place, config, split)
    if any(place.glob("*.parquet")) or any(place.glob("*/*.parquet")):
        return _loaded(config, split, {"path": str(place)})
    if split == "train":
        if config.captions and (pictures := _pictures_in(place)):
            rows: list[dict[str, Any]] = [{} for _ in pictures]
            return _of_paths(str(place), rows, [picture.name for picture in pictures], place)
        return _files(place, config)
    if (place / split).is_dir():
        raise InputError(f"{place / split} has neither metadata.jsonl nor .tar files; give it its own, or remove it")
    raise MissingSplitError(f"{place} has no split {split!r}; make a folder {split}/ with its own metadata.jsonl")


def _pictures_in(place: Path) -> list[Path]:
    """Return the pictures in a folder, by their names."""
    kinds = [f".{kind}" for kind in PICTURES]
    return sorted(file for file in place.glob("*") if file.suffix.lower() in kinds)


def _files(place: Path, config: DataConfig) -> Source:
    """Open one file, all files of a pattern, or the tar files of a folder."""
    files = [place] if place.is_file() else _matching(str(place / "*.tar") if place.is_dir() else str(place))
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"}:
        return _shards(files, config)
    if len(files) == 1 and kinds <= {".csv", ".tsv", ".jsonl"}:
        return _table(files[0], config)
    if kinds == {".parquet"}:
        return _loaded(config, "train", {"path": "parquet", "data_files": [str(file) for file in files]})
    if kinds == {".arrow"}:
        import datasets

        tables = [datasets.Dataset.from_file(str(file)) for file in files]
        return _from_datasets(datasets.concatenate_datasets(tables), config, files)
    raise InputError(f"{config.folder} has no metadata.jsonl and is nothing else that is known; expected {EXPECTED}")


def _image_folder(folder: Path, config: DataConfig) -> Source:
    file = folder / "metadata.jsonl"
    rows = _read_json_lines(file)
    image = config.image_column or "file_name"
    if rows and not any(image in row for row in rows):
        _column("image", image, rows, (), str(file))
    rows = _captioned(rows, config, str(file))
    return _of_paths(str(folder), rows, [row.get(image) for row in rows], folder)


def _table(file: Path, config: DataConfig) -> Source:
    """Read a file of paths, relative to it, and captions; in CSV one picture may have a row for each caption."""
    rows = _read_json_lines(file) if file.suffix.lower() == ".jsonl" else _read_csv(file)
    if not rows:
        raise InputError(f"{file} has no rows; expected paths of pictures and their captions")
    image = _column("image", config.image_column, rows, IMAGE_COLUMNS, str(file))
    caption = "" if config.captions else _column("caption", config.caption_column, rows, CAPTION_COLUMNS, str(file))
    rows = [row | {"captions": None if SURPLUS in row else row.get(caption)} for row in rows]
    if file.suffix.lower() != ".jsonl":
        merged: dict[str, dict[str, Any]] = {}
        for row in rows:
            merged.setdefault(row[image], row | {"captions": []})["captions"].append(row["captions"])
        rows = list(merged.values())
    return _of_paths(str(file), rows, [row.get(image) for row in rows], file.parent)


def _captioned(rows: list[dict[str, Any]], config: DataConfig, place: str) -> list[dict[str, Any]]:
    """Add "captions" to rows that may call them differently, each by the first usual name that says something."""
    if config.captions:
        return rows
    if config.caption_column is not None or not any(name in row for row in rows for name in CAPTION_COLUMNS):
        column = _column("caption", config.caption_column, rows, (), place) if rows else ""
        return [row | {"captions": row.get(column)} for row in rows]
    return [row | {"captions": next(filter(None, map(row.get, CAPTION_COLUMNS)), None)} for row in rows]


def _of_paths(place: str, rows: list[dict[str, Any]], paths: Sequence[Any], base: Path) -> Source:
    files = [base / path for path in paths if isinstance(path, str)]
    names = [str(path or f"row {number}") for number, path in enumerate(paths)]
    return Source(place, rows, names, partial(_read_cell, paths, base), files)


def _matching(pattern: str) -> list[Path]:
    """Return the files of a pattern; each name that its braces stand for must be there, or match what is.

    Raises:
        InputError: one does not.
    """
    names = expand_braces(pattern)
    found = [sorted(glob.glob(name, recursive=True)) for name in names]
    if len(names) > 1 and not all(found):
        raise InputError(f"{names[found.index([])]} of {pattern} is not there; make it, or name only those that are")
    return [Path(name) for group in found for name in group]


def _shards(files: Sequence[Path], config: DataConfig) -> Source:
    return _of_members(read_shards(files), str(files[0].parent), config, files)


def _remote(config: DataConfig, split: str, cache: Path | None) -> Source:
    place = shown(config.folder)
    urls = expand_braces(config.folder)
    if not all(shown(url).lower().endswith(".tar") for url in urls):
        raise InputError(f"{place}: only .tar files are read from an address; download others, or name hub:owner/name")
    if split != "train":
        raise MissingSplitError(f"{place} has no split {split!r}; set data.held_out to hold out a share")
    members = read_remote_shards(urls, cache)
    source = _of_members(members, place, config, ())
    return replace(source, findings=[one.finding or "no picture" for one in members])


def _of_members(members: Sequence[Member], place: str, config: DataConfig, files: Sequence[Path]) -> Source:
    rows = _captioned([one.row for one in members], config, place)
    return Source(place, rows, [one.name for one in members], partial(_read_member, members), files)


def _loaded(config: DataConfig, split: str, arguments: dict[str, Any]) -> Source:
    """Open what `datasets` makes of a hub name or of parquet files."""
    import datasets

    try:
        tables = datasets.load_dataset(**arguments)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{config.folder}: `datasets` cannot load it: {reason}") from error
    return _of_split(tables, config, split)


def _saved_dataset(place: Path, config: DataConfig, split: str) -> Source:
    import datasets

    table = datasets.load_from_disk(str(place))
    return _of_split(table if isinstance(table, datasets.DatasetDict) else {"train": table}, config, split)


def _of_split(tables: Mapping[str, Any], config: DataConfig, split: str) -> Source:
    if split not in tables:
        raise MissingSplitError(f"{config.folder} has no split {split!r}{suggest(split, tables)}")
    return _from_datasets(tables[split], config, [Path(one["filename"]) for one in tables[split].cache_files])


def _from_datasets(table: Any, config: DataConfig, files: Sequence[Path]) -> Source:
    """Read a `datasets.Dataset` with a column of pictures (encoded, or paths) and one of captions."""
    import datasets

    columns = [dict.fromkeys(table.column_names)]
    images = tuple(name for name, feature in table.features.items() if isinstance(feature, datasets.Image))
    image = _column("image", config.image_column, columns, images or IMAGE_COLUMNS, config.folder)
    caption = None
    if not config.captions:
        caption = _column("caption", config.caption_column, columns, CAPTION_COLUMNS, config.folder)
    if image in images:
        table = table.cast_column(image, datasets.Image(decode=False))
    pictures = table.select_columns([image])
    rows = [row | {"captions": row.get(caption)} for row in table.remove_columns([image]).to_list()]
    base = Path(config.folder).parent
    names = [f"row {number}" for number in range(len(rows))]
    return Source(config.folder, rows, names, partial(_read_cell, pictures, base, column=image), files)


# What reads a picture by its number; functions of a module, as they go to other processes.


def _read_of_subset(read: Callable[[int], bytes], numbers: Sequence[int], index: int) -> bytes:
    return read(numbers[index])


def _read_member(members: Sequence[Member], index: int) -> bytes:
    return members[index].read()


def _read_cell(cells: Any, base: Path, index: int, column: str | None = None) -> bytes:
    """Return the encoded picture that a cell holds or names."""
    value = cells[index] if column is None else cells[index][column]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("no picture")
    return (base / value).read_bytes()


def _column(kind: str, chosen: str | None, rows: Sequence[dict[str, Any]], usual: Sequence[str], place: str) -> str:
    """Return which column holds the pictures or captions: the one chosen, or the only one with a usual name."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    there = ", ".join(columns)
    if chosen is not None:
        if chosen not in columns:
            raise InputError(f"{place} has no column {chosen!r} (data.{kind}_column); its columns are {there}")
        return chosen
    found = [name for name in columns if name in usual or name.lower() in usual]
    if len(found) != 1:
        problem = f"{' and '.join(found)} may all be the {kind}" if found else f"no column looks like the {kind}"
        raise InputError(f"{place}: {problem}; set data.{kind}_column to one of its columns: {there or '(none)'}")
    return found[0]


def _read_csv(file: Path) -> list[dict[str, Any]]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(2**30)  # a caption that is too long is one bad row, no bad file
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream, delimiter=delimiter, restkey=SURPLUS))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read as CSV in UTF-8: {error}; write it again") from error
    finally:
        csv.field_size_limit(limit)


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text in UTF-8: {error}; write it again") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}:{number} is not JSON: {error}; each line is one object") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number} must be an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def is_wanted(row: dict[str, Any], config: DataConfig) -> bool:
    """Say whether a picture is one that a config keeps, by what is known of it."""
    kept = all(row.get(column) in values for column, values in config.keep.items())
    return kept and not any(row.get(column) in values for column, values in config.drop.items())
