"""Captioned pictures in memory: an imagefolder (metadata.jsonl beside its pictures) as arrays and captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from latentdiff.errors import InputError
from training.config import DataConfig

# Above this share of unusable rows a data set is refused.
MAX_BAD_SHARE = 0.01


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and what is known of each.

    Attributes:
        images: (N, H, W, 4) uint8, RGBA, not premultiplied.
        rows: N metadata rows; each has "captions", a list of at least one string.
        skipped: file name and reason of every row left out.
    """

    images: np.ndarray
    rows: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


def load_images(config: DataConfig, split: str = "train") -> CaptionedImages:
    """Read one split of a captioned folder.

    The folder holds metadata.jsonl itself, or has one folder a split (train, validation, test), as `datasets` knows it.
    A row has "file_name" and "text", or "captions" (a list).

    Raises:
        InputError: no metadata, no row left, or more than 1 % of the rows without caption or with a broken file.
    """
    folder = Path(config.folder)
    if (folder / split / "metadata.jsonl").is_file():
        folder = folder / split
    elif split != "train" or not (folder / "metadata.jsonl").is_file():
        raise InputError(
            f"{folder} has no metadata.jsonl (nor {split}/metadata.jsonl); expected one JSON object a line with"
            ' "file_name" and "text", as `latentdiff data emoji` writes'
        )
    rows = [row for row in _read_rows(folder / "metadata.jsonl") if _wanted(row, config)]
    if not rows:
        raise InputError(f"{folder}: no picture is left after data.keep and data.drop; loosen them")
    images, kept, skipped = [], [], []
    for row in rows:
        try:
            row = row | {"captions": _captions(row)}
            images.append(_load(folder / str(row["file_name"]), config.size))
            kept.append(row)
        except (ValueError, OSError, KeyError) as error:
            skipped.append(f"{row.get('file_name', '?')}: {error}")
    if len(skipped) > MAX_BAD_SHARE * len(rows):
        raise InputError(
            f"{folder}: {len(skipped)} of {len(rows)} rows are unusable (at most 1 % may be), first {skipped[0]};"
            " mend or remove them"
        )
    return CaptionedImages(np.stack(images), kept, skipped)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return which samples the batch of `step` holds: a pure function of its arguments.

    Every epoch is a permutation of all samples; a batch may straddle two epochs.

    Returns:
        (batch_size,) int64.
    """
    first = step * batch_size
    epochs = range(first // count, (first + batch_size - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    offset = first - epochs[0] * count
    return order[offset : offset + batch_size]


def composite(rgba: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """Lay RGBA pictures (..., 4) uint8 on one colour (three values 0..255): RGB (..., 3) uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(background, dtype=np.float32) * (1 - alpha)
    return (mixed + 0.5).astype(np.uint8)


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
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


def _wanted(row: dict[str, Any], config: DataConfig) -> bool:
    kept = all(row.get(column) in values for column, values in config.keep.items())
    return kept and not any(row.get(column) in values for column, values in config.drop.items())


def _captions(row: dict[str, Any]) -> list[str]:
    captions = row.get("captions") or [row.get("text")]
    if not isinstance(captions, list) or not all(isinstance(c, str) and c.strip() for c in captions):
        raise ValueError("no caption")
    return captions


def _load(file: Path, size: int) -> np.ndarray:
    with Image.open(file) as image:
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
    if rgba.size != (size, size):
        rgba = ImageOps.fit(rgba, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(rgba)
