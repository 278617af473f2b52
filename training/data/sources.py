"""Open captioned pictures, wherever they are kept: folders, tables, tar shards, and what `datasets` reads."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError, LatentDiffError, shown
from latentdiff.files import is_file, is_folder, read_file

from ..config import DataConfig
from .library import HUB, from_arrow, from_hub, from_parquet, from_saved, is_saved
from .remote import is_remote, without_secrets
from .shards import MAX_METADATA_BYTES, Member, expand_braces, read_remote_shards, read_shards
from .source import MissingSplitError, Source, files_in, of_paths, pictures_in
from .tables import CAPTION_COLUMNS, IMAGE_COLUMNS, SURPLUS, column, decode_text, read_table

METADATA = ("metadata.jsonl", "metadata.csv")
EXPECTED = (
    'an imagefolder (metadata.jsonl or metadata.csv with "file_name" and "text", or pictures with their captions in '
    ".txt or .caption files beside them), a .csv, .jsonl, .parquet, .arrow or .tar file, a pattern of such files, the "
    "address of .tar files, or hub:owner/name"
)


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
    try:
        source = _open(config, split, cache)
    except LatentDiffError:
        raise
    except (OSError, ValueError) as error:  # of a path that no system has
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{shown(config.folder, 200)} cannot be read ({reason}); check data.folder") from error
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
        return from_hub(config, split)
    place = Path(config.folder)
    for folder in (place / split, place)[: 2 if split == "train" else 1]:
        if (table := next((folder / name for name in METADATA if is_file(folder / name)), None)) is not None:
            return _image_folder(table, config)
    if shards := files_in(place / split, "tar"):
        return _shards(shards, config)
    if is_saved(place):
        return from_saved(place, config, split)
    if files_in(place, "parquet") or glob.glob(f"{glob.escape(config.folder)}/*/*.parquet"):
        return from_parquet(config, split)
    if pictures := pictures_in(place / split):
        return _pictures(pictures, config)
    if split == "train":
        pictures = pictures_in(place)
        return _pictures(pictures, config) if pictures and not files_in(place, "tar") else _files(place, config)
    if is_folder(place / split):
        raise InputError(
            f"{place / split} has neither metadata.jsonl nor .tar files, nor pictures; give it its own, or remove it"
        )
    raise MissingSplitError(f"{place} has no split {split!r}; make a folder {split}/ with its own pictures")


def _files(place: Path, config: DataConfig) -> Source:
    """Open one file, all files of a pattern, or the tar files of a folder."""
    if is_file(place):
        files = [place]
    else:
        files = files_in(place, "tar") if is_folder(place) else _matching(str(place))
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"}:
        return _shards(files, config)
    if len(files) == 1 and kinds <= {".csv", ".tsv", ".jsonl"}:
        return _table(files[0], config)
    if kinds == {".parquet"}:
        return from_parquet(config, "train", files)
    if kinds == {".arrow"}:
        return from_arrow(config, files)
    given = shown(config.folder, 120)
    if not files and not is_folder(place):
        raise InputError(f"there is no file or folder {given}; check the path")
    raise InputError(f"{given} has no metadata.jsonl and is nothing else that is known; expected {EXPECTED}")


def _image_folder(table: Path, config: DataConfig) -> Source:
    rows = read_table(table)
    image = config.image_column or "file_name"
    if rows and not any(image in row for row in rows):
        column("image", image, rows, (), str(table))
    rows = _captioned(rows, config, str(table))
    if table.suffix == ".csv":
        rows = _merged(rows, image)
    source = of_paths(str(table.parent), rows, [row.get(image) for row in rows], table.parent)
    return replace(source, table=table)


def _table(file: Path, config: DataConfig) -> Source:
    """Read a file of paths, relative to it, and captions; in CSV one picture may have a row for each caption."""
    rows = read_table(file)
    if not rows:
        raise InputError(f"{file} has no rows; expected paths of pictures and their captions")
    image = column("image", config.image_column, rows, IMAGE_COLUMNS, str(file))
    caption = "" if config.captions else column("caption", config.caption_column, rows, CAPTION_COLUMNS, str(file))
    rows = [row | {"captions": row.get(caption)} for row in rows]
    if file.suffix.lower() != ".jsonl":
        rows = _merged(rows, image)
    return of_paths(str(file), rows, [row.get(image) for row in rows], file.parent)


def _merged(rows: list[dict[str, Any]], image: str) -> list[dict[str, Any]]:
    """Return the rows of a CSV file, those of one picture as one; a row with cells too many has no caption."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        caption = None if SURPLUS in row else row.get("captions")
        merged.setdefault(row[image], row | {"captions": []})["captions"].append(caption)
    return list(merged.values())


def _pictures(pictures: Sequence[Path], config: DataConfig) -> Source:
    """Open the pictures of a folder, each with its caption in a file of its name, or all with none."""
    folder = pictures[0].parent
    rows: list[dict[str, Any]] = [{} for _ in pictures]
    sidecars = [] if config.captions else [*files_in(folder, "caption"), *files_in(folder, "txt")]
    texts = {file.stem: file for file in sidecars}  # a .txt file where there are both
    if captioned := any(picture.stem in texts for picture in pictures):
        rows = [{"captions": _text(texts.get(picture.stem))} for picture in pictures]
    elif not config.captions:
        rows = [{"captions": [""]} for _ in pictures]
    source = of_paths(str(folder), rows, [picture.name for picture in pictures], folder)
    return replace(source, uncaptioned=not captioned and not config.captions)


def _text(file: Path | None) -> str | dict[str, str] | None:
    """Return the caption in a file beside a picture, or what is wrong with it as "reason"."""
    try:
        if file is None:
            return ""
        return decode_text(read_file(file, MAX_METADATA_BYTES, "caption"), f"its {file.suffix} file").strip()
    except InputError as error:
        return {"reason": str(error)}


def _captioned(rows: list[dict[str, Any]], config: DataConfig, place: str) -> list[dict[str, Any]]:
    """Add "captions" to rows that may call them differently, each by the first usual name that says something."""
    if config.captions:
        return rows
    if config.caption_column is not None or not any(name in row for row in rows for name in CAPTION_COLUMNS):
        chosen = column("caption", config.caption_column, rows, (), place) if rows else ""
        return [row | {"captions": row.get(chosen)} for row in rows]
    return [row | {"captions": next(filter(None, map(row.get, CAPTION_COLUMNS)), None)} for row in rows]


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
    place = without_secrets(config.folder)
    urls = expand_braces(config.folder)
    if not all(without_secrets(url).lower().endswith(".tar") for url in urls):
        raise InputError(f"{place}: only .tar files are read from an address; download others, or name hub:owner/name")
    if split != "train":
        raise MissingSplitError(f"{place} has no split {split!r}; set data.held_out to hold out a share")
    members = read_remote_shards(urls, cache)
    source = _of_members(members, place, config, ())
    return replace(source, findings=[one.finding or "no picture" for one in members])


def _of_members(members: Sequence[Member], place: str, config: DataConfig, files: Sequence[Path]) -> Source:
    rows = _captioned([one.row for one in members], config, place)
    return Source(place, rows, [one.name for one in members], partial(_read_member, members), files)


def _read_member(members: Sequence[Member], index: int) -> bytes:
    return members[index].read()


def is_wanted(row: dict[str, Any], config: DataConfig) -> bool:
    """Say whether a picture is one that a config keeps, by what is known of it."""
    kept = all(row.get(name) in values for name, values in config.keep.items())
    return kept and not any(row.get(name) in values for name, values in config.drop.items())
