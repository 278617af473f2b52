"""Captioned pictures that the library `datasets` reads: from a hub, and parquet and arrow files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import InputError, LatentDiffError, shown, suggest
from latentdiff.files import is_file, is_folder, parse_json, read_file

from ..config import DataConfig
from .source import MissingSplitError, Source, read_cell
from .tables import CAPTION_COLUMNS, IMAGE_COLUMNS, column

if TYPE_CHECKING:
    import datasets

HUB = "hub:"
# owner/name, or a name alone; a path is none.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_INFO_BYTES = 2**24


def from_hub(config: DataConfig, split: str) -> Source:
    """Open a split of a set on a hub, or what is kept of it here.

    Raises:
        MissingSplitError: it has no such split.
        InputError: the name is none, or it cannot be loaded.
    """
    name = config.folder.removeprefix(HUB)
    if HUB_NAME.fullmatch(name) is None or ".." in name:
        raise InputError(f"{HUB} must be followed by the name of a set, as in {HUB}owner/name, got {shown(name)}")
    return _loaded(config, split, path=name)


def from_parquet(config: DataConfig, split: str, files: Sequence[Path] | None = None) -> Source:
    """Open a split of a folder of parquet files, or the files themselves.

    Raises:
        MissingSplitError: there is no such split.
        InputError: they cannot be loaded.
    """
    if files is None:
        return _loaded(config, split, path=str(Path(config.folder)))
    return _loaded(config, split, path="parquet", data_files=[str(file) for file in files])


def from_arrow(config: DataConfig, files: Sequence[Path]) -> Source:
    """Open arrow files.

    Raises:
        InputError: they cannot be read.
    """
    import datasets

    with _refusing(config.folder):
        table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    return _from_table(table, config, files)


def is_saved(place: Path) -> bool:
    """Say whether a folder is what `save_to_disk` writes."""
    return is_file(place / "dataset_info.json") or is_file(place / "dataset_dict.json")


def from_saved(place: Path, config: DataConfig, split: str) -> Source:
    """Open a split of what `save_to_disk` has written.

    Raises:
        MissingSplitError: it has no such split.
        InputError: it is damaged, or names files outside of its folder.
    """
    import datasets

    _check_names(place)
    with _refusing(config.folder):
        table = datasets.load_from_disk(str(place))
    return _of_split(table if isinstance(table, datasets.DatasetDict) else {"train": table}, config, split)


def _check_names(place: Path) -> None:
    """Refuse a saved set that names files in other folders: it may have come from anywhere.

    Raises:
        InputError: it does, or what says so is damaged.
    """
    folders = [place]
    if is_file(place / "dataset_dict.json"):
        splits = _known(place / "dataset_dict.json", "splits", str)
        folders = [place / name for name in splits]
    for folder in folders:
        _known(folder / "state.json", "_data_files", lambda one: one["filename"])


def _known(file: Path, key: str, name_of: Callable[[Any], str]) -> list[str]:
    """Return the names in a list in a JSON file, each of something in the folder of the file."""
    content = parse_json(read_file(file, MAX_INFO_BYTES), str(file))
    try:
        names = [name_of(one) for one in content[key]]
    except (TypeError, KeyError) as error:
        raise InputError(f"{file} must have a list {key!r} of names; save the set again") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or os.path.basename(name) != name or "\\" in name:
            raise InputError(f"{file} names {shown(name)}, which is nothing in its folder; save the set again")
    return names


def _loaded(config: DataConfig, split: str, path: str, **files: list[str]) -> Source:
    import datasets

    with _refusing(config.folder):
        tables = datasets.load_dataset(path=path, **files)
    return _of_split(tables, config, split)


@contextmanager
def _refusing(place: str) -> Iterator[None]:
    """Make an InputError of whatever `datasets` and pyarrow raise on files that they cannot read."""
    try:
        yield
    except (LatentDiffError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{place}: `datasets` cannot load it: {reason}") from error


def _of_split(tables: Mapping[str, datasets.Dataset], config: DataConfig, split: str) -> Source:
    if split not in tables:
        raise MissingSplitError(f"{config.folder} has no split {split!r}{suggest(split, tables)}")
    return _from_table(tables[split], config, [Path(one["filename"]) for one in tables[split].cache_files])


def _from_table(table: datasets.Dataset, config: DataConfig, files: Sequence[Path]) -> Source:
    """Read a table with a column of pictures (encoded, or paths) and one of captions."""
    import datasets

    columns = [dict.fromkeys(table.column_names)]
    images = tuple(name for name, feature in table.features.items() if isinstance(feature, datasets.Image))
    image = column("image", config.image_column, columns, images or IMAGE_COLUMNS, config.folder)
    caption = None
    if not config.captions:
        caption = column("caption", config.caption_column, columns, CAPTION_COLUMNS, config.folder)
    with _refusing(config.folder):
        if image in images:
            table = table.cast_column(image, datasets.Image(decode=False))
        pictures = table.select_columns([image])
        rows = [row | {"captions": row.get(caption)} for row in table.remove_columns([image]).to_list()]
    names = [f"row {number}" for number in range(len(rows))]
    read = partial(read_cell, pictures, _bases(config.folder), column=image)
    return Source(config.folder, rows, names, read, files)


def _bases(place: str) -> list[Path]:
    """Return the folders that pictures may lie in: of files, their own; of a hub, where its files are kept here."""
    if not place.startswith(HUB):
        return [Path(place) if is_folder(place) else Path(place).parent]
    import datasets
    from huggingface_hub import constants

    kept = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    return [Path(folder) for folder in kept]
