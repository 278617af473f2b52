"""Pictures of any other model: a folder of them, and what each was to show."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError, shown
from latentdiff.evaluate.pictures import Item
from latentdiff.files import is_file, is_folder, parse_json, read_file
from latentdiff.generation.result import read_record
from latentdiff.images import MAX_FILE_BYTES
from latentdiff.prompts import check_prompt

__all__ = ["common_folder", "digest_of_pictures", "find_pictures"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
PROMPT_KEYS = ("prompt", "text", "caption")


def find_pictures(
    folder: Path, prompts: Path | None = None, files: Sequence[Path] | None = None
) -> list[tuple[Path, Item]]:
    """Return the pictures of a folder, each with what it was to show; its prompt is empty where nothing tells it.

    Args:
        folder: its PNG, JPEG and WebP files are taken, at any depth, by name, numbers in them by their value.
        prompts: JSON lines with "prompt" (or "text", "caption") and maybe "file_name" and "seed": of that picture, or
            in the order of the pictures; what else a line says is the truth that metrics check by. None for
            metadata.jsonl in the folder, else for the records that pictures of latentdiff carry.
        files: the pictures in the folder, in an order of their own; None for that of their names.

    Raises:
        InputError: there are no pictures, or their prompts do not fit them.
    """
    if not is_folder(folder):
        raise InputError(f"--pictures must be a folder of pictures, got {shown(str(folder))}; check the path")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    paths = sorted(found, key=_natural) if files is None else [*files]
    if not paths:
        raise InputError(f"{folder} must hold PNG, JPEG or WebP pictures, got none; check the path")
    file = folder / METADATA if prompts is None and is_file(folder / METADATA) else prompts
    if file is None:
        pictures = [(path, _of_record(path, number)) for number, path in enumerate(paths)]
    else:
        pictures = list(_of_rows(file, folder, paths))
    if len({item.name for _, item in pictures}) < len(pictures):  # the same prompt and seed drawn in several ways
        pictures = [(path, Item(one.prompt, number, one.truth)) for number, (path, one) in enumerate(pictures)]
    return pictures


def common_folder(paths: Sequence[Path]) -> Path:
    """Return the folder that all of some files are in."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def digest_of_pictures(pictures: Sequence[tuple[Path, Item]]) -> str:
    """Return eight hexadecimal digits of files and prompts, in their order."""
    digest = hashlib.sha256()
    for path, item in pictures:
        digest.update(hashlib.sha256(read_file(path, MAX_FILE_BYTES, "image")).digest() + item.name.encode())
    return digest.hexdigest()[:8]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]


def _of_record(path: Path, number: int) -> Item:
    try:
        record = read_record(path)
    except InputError:  # of something else, or without metadata: a broken picture is refused when it is measured
        return Item("", number)
    seed = record.get("seed")
    return Item(str(record.get("prompt", "")), seed if isinstance(seed, int) else number)


def _of_rows(file: Path, folder: Path, paths: Sequence[Path]) -> Iterator[tuple[Path, Item]]:
    rows = _rows(file)
    named = ["file_name" in row for row in rows]
    if any(named) and not all(named):
        raise InputError(f'{file}, line {named.index(False) + 1} has no "file_name" and others have; name all or none')
    if not any(named) and len(rows) != len(paths):
        raise InputError(
            f"{file} must have a line for each of the {len(paths)} pictures of {folder}, got {len(rows)}; "
            'say in each which picture it is of, as in {"file_name": "fox.png", "prompt": "a fox"}'
        )
    for number, row in enumerate(rows):
        path = _named(file, folder, row, number) if any(named) else paths[number]
        key = next((key for key in PROMPT_KEYS if key in row), None)
        if key is None:
            raise InputError(f'{file}, line {number + 1} must have "prompt", got {shown(dict(row))}; add it')
        prompt = check_prompt(row[key], what=f"{file}, line {number + 1}: {key}", allow_empty=True)
        seed = row.get("seed", number)
        if not isinstance(seed, int):
            raise InputError(f"{file}, line {number + 1}: seed must be a whole number, got {shown(seed)}; correct it")
        truth = {name: value for name, value in row.items() if name not in (key, "file_name", "seed")}
        yield path, Item(prompt, seed, truth)


def _named(file: Path, folder: Path, row: Mapping[str, Any], number: int) -> Path:
    name = row["file_name"]
    path = folder / str(name)
    if not isinstance(name, str) or not path.resolve().is_relative_to(folder.resolve()) or not is_file(path):
        raise InputError(f"{file}, line {number + 1}: {folder} has no picture {shown(name)}; check file_name")
    return path


def _rows(file: Path) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(read_file(file, MAX_FILE_BYTES, "prompts").splitlines()):
        if not line.strip():
            continue
        row = parse_json(line, f"{file}, line {number + 1},")
        if not isinstance(row, dict):
            raise InputError(f'{file}, line {number + 1} must be {{"prompt": ...}}, got {shown(row)}; correct it')
        found.append(row)
    if not found:
        raise InputError(f"{file} must have a line for each picture, got none; write them")
    return found
