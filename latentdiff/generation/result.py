"""What a pipeline returns: pictures, and everything that makes each of them again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.errors import InputError
from latentdiff.generation.request import parameters_text
from latentdiff.images import numbered, read_texts, write_png

__all__ = ["Result", "read_record", "record_of"]

METADATA_KEY = "latentdiff"  # of the PNG text chunk that holds an image's record as JSON, and of PIL's info
MAX_CHAIN = 4  # pictures drawn of one another, the records of which are kept within each other


@dataclass(frozen=True)
class Result:
    """What a call returns; image i belongs to seeds[i].

    Attributes:
        images: by output_type: a list of pictures ("pil"), a tensor (B, 3, H, W) or array (B, H, W, 3) in [0, 1]
            ("pt", "np"), or scaled latents (B, C, h, w) float32 ("latent"). Pictures are RGB, or RGBA where what was
            passed in is transparent; each knows what made it, so that what is drawn of it can be replayed too.
        seeds: each alone makes its image again.
        settings: what all images have in common.
        own: what each image has besides, its place in its batch included; see `record`.
        token_counts: tokens of each image's prompt, begin and end included.
        window_counts: in how many windows of the text encoder that prompt was encoded; 1 unless it is long.
        notes: what the caller should know, such as a picture that had to be decoded in float32.
    """

    images: Any
    seeds: list[int]
    settings: dict[str, Any]
    own: list[dict[str, Any]]
    token_counts: list[int]
    window_counts: list[int]
    notes: list[str]

    def record(self, index: int) -> dict[str, Any]:
        """Return everything that makes image `index` again, JSON-ready."""
        return {**self.own[index], **self.settings}

    def __post_init__(self) -> None:
        """Let every picture tell what made it, to a call that it is passed to."""
        for index, picture in enumerate(self.images if isinstance(self.images, list) else []):
            picture.info[METADATA_KEY] = json.dumps(self.record(index))

    def write(self, index: int, path: str | os.PathLike[str]) -> None:
        """Write image `index` as a PNG that says how to make it again (`latentdiff replay`).

        Raises:
            InputError: the call had another output_type than "pil".
            StorageError: the file cannot be written.
        """
        if not isinstance(self.images, list):
            raise InputError('only pictures can be saved, got tensors; call with output_type="pil"')
        record = self.record(index)
        texts = {METADATA_KEY: json.dumps(record), "parameters": parameters_text(record)}
        write_png(path, self.images[index], texts)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write all images, as fox.png, fox-2.png, fox-3.png, ..., and return their paths; see `write`."""
        paths = list(islice(numbered(path), len(self.seeds)))
        for index, one in enumerate(paths):
            self.write(index, one)
        return paths


def record_of(picture: Image.Image) -> dict[str, Any] | None:
    """Return what made a picture that a call returned; None where that is not known.

    Whether it was changed since shows when it is drawn again.
    """
    text = picture.info.get(METADATA_KEY)
    try:
        record = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _chain(record) < MAX_CHAIN else None


def _chain(record: Any) -> int:
    """Return how many pictures a record tells of that were drawn of one another."""
    links = 0
    while isinstance(record, dict):
        links, image = links + 1, record.get("image")
        record = image.get("record") if isinstance(image, dict) else None
    return links


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `Result.write` put into a PNG.

    Raises:
        InputError: the file cannot be read, or holds no settings.
    """
    try:
        record = json.loads(read_texts(path).get(METADATA_KEY, ""))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{os.fspath(path)} must hold latentdiff's settings, got none; use the file as it was written")
    if _chain(record) > MAX_CHAIN:
        raise InputError(f"{os.fspath(path)} must tell of at most {MAX_CHAIN} pictures drawn of one another, got more")
    return record
