"""Captioned pictures ready to train on: each examined once, bad ones skipped and reported, decoded when asked for."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from latentdiff.errors import InputError, StorageError
from latentdiff.images import decode_rgba, fit, write_file
from latentdiff.prompts import MAX_PROMPT_LENGTH
from training.buckets import bucket_sizes, crop_corner, nearest
from training.config import DataConfig
from training.loading import prefetched
from training.order import BatchOrder
from training.sources import Source, open_source

# Above this share of unusable rows, and more than one, a data set is refused.
MAX_BAD_SHARE = 0.01
# Sets whose pictures take no more than this are decoded once and held in memory.
IN_MEMORY_BYTES = 2**30

Finding = tuple[str, int, int]  # of a picture: SHA-256 of its file, width and height


@dataclass(frozen=True)
class Sample:
    """What is known of one picture besides its row.

    Attributes:
        place: its number among all rows, those that were skipped included.
        digest: SHA-256 of the encoded picture.
        size: width and height as it would be seen, upright.
        frame: width and height that it is scaled to cover and cropped to.
    """

    place: int
    digest: str
    size: tuple[int, int]
    frame: tuple[int, int]

    @property
    def condition(self) -> tuple[int, ...]:
        """Height and width before scaling, what the crop leaves out above and at the left, height and width after.

        Source: Podell et al. 2023, 2307.01952, section 2.2.
        """
        return (*self.size[::-1], *crop_corner(self.size, self.frame), *self.frame[::-1])


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and what is known of each.

    Attributes:
        images: images[i] is (H, W, 4) uint8, RGBA, not premultiplied: an array (N, H, W, 4), or `LazyImages`.
        rows: N metadata rows; each has "captions", a list of at least one string.
        samples: N, one for each row.
        skipped: "place", "name" and "reason" of every row left out.
    """

    images: Any
    rows: list[dict[str, Any]]
    samples: list[Sample]
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> int:
        """Return the number of a sample among all rows: what its augmentation follows from, whatever was skipped."""
        return self.samples[index].place

    @cached_property
    def order(self) -> BatchOrder:
        """What batches are drawn from: samples of one frame are a group."""
        frames = sorted({sample.frame for sample in self.samples})
        groups = np.array([frames.index(sample.frame) for sample in self.samples])
        places = np.array([sample.place for sample in self.samples])
        return BatchOrder(places, groups, len(self.samples) + len(self.skipped))


@dataclass(frozen=True)
class LazyImages:
    """Pictures that are read and decoded whenever they are asked for."""

    source: Source
    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """Return one picture (H, W, 4), or those of a slice (B, H, W, 4), as RGBA uint8."""
        if isinstance(index, slice):
            return np.stack([self[number] for number in range(*index.indices(len(self)))])
        sample = self.samples[index]
        try:
            return _framed(_decode(self.source, sample.place)[1], sample.frame)
        except ValueError as error:
            raise InputError(f"{self.source.place}: a picture has changed while it is in use: {error}") from error


def load_images(config: DataConfig, split: str = "train") -> CaptionedImages:
    """Decode all pictures of one split, squares of data.size, whatever the size of the set.

    Raises:
        InputError: see `open_images`.
    """
    source = open_source(config, split)
    return _in_memory(source, [(config.size, config.size)])


def open_images(
    config: DataConfig, batch_size: int, folder: Path, cache: Path | None = None, multiple: int = 8
) -> CaptionedImages:
    """Open the captioned pictures to train on; those of a large set are decoded only when they are asked for.

    Each picture is read and decoded once to see whether it can be; for a large set what was found is kept. What was
    skipped is named in skipped.jsonl.

    Args:
        folder: of the run.
        cache: folder of what is kept; in that of the run when None.
        multiple: what the widths and heights of buckets are multiples of, in pixels.

    Raises:
        InputError: nothing of a known kind, a missing column, no picture left, or more than one picture and more than
            1 % of all broken or without caption.
        StorageError: a folder cannot be written.
    """
    source = open_source(config)
    frames = bucket_sizes(config.size, multiple) if config.buckets else [(config.size, config.size)]
    if len(source) * config.size**2 * 4 > IN_MEMORY_BYTES:
        data = _lazy(source, frames, cache or folder / "cache")
    else:
        data = _in_memory(source, frames)
    if data.skipped:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in data.skipped]
        _folder(folder)
        write_file(folder / "skipped.jsonl", "".join(lines).encode())
        print(f"{len(data.skipped)} of {len(source)} pictures are skipped: {folder}/skipped.jsonl", file=sys.stderr)
    if len(data) < batch_size:
        print(f"{len(data)} pictures are fewer than a batch of {batch_size}: batches repeat some", file=sys.stderr)
    return data


def composite(rgba: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """Lay RGBA pictures (..., 4) uint8 on one colour (three values 0..255): RGB (..., 3) uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(background, dtype=np.float32) * (1 - alpha)
    return (mixed + 0.5).astype(np.uint8)


def _in_memory(source: Source, frames: list[tuple[int, int]]) -> CaptionedImages:
    pictures: dict[int, np.ndarray] = {}

    def examine(place: int) -> Finding:
        digest, image = _decode(source, place)
        pictures[place] = _framed(image, nearest(*image.size, frames))
        return digest, *image.size

    samples, rows, skipped = _sift(source, _examined(source, examine), frames)
    images: Any = [pictures.pop(sample.place) for sample in samples]
    return CaptionedImages(np.stack(images) if len(frames) == 1 else images, rows, samples, skipped)


def _lazy(source: Source, frames: list[tuple[int, int]], cache: Path) -> CaptionedImages:
    _folder(cache)
    file = cache / f"pictures-{_stamp(source)}.json"

    def examine(place: int) -> Finding:
        digest, image = _decode(source, place)
        return digest, *image.size

    with FileLock(cache / "pictures.lock"):  # one process looks, the others read what it found
        if not file.exists():
            write_file(file, json.dumps(_examined(source, examine)).encode())
    samples, rows, skipped = _sift(source, json.loads(file.read_text()), frames)
    return CaptionedImages(LazyImages(source, samples), rows, samples, skipped)


def _examined(source: Source, examine: Callable[[int], Finding]) -> list[Finding | str]:
    """Return what is found of every picture, or why there is nothing to be found."""

    def attempt(place: int) -> Finding | str:
        try:
            return examine(place)
        except ValueError as error:
            return str(error).removeprefix(f"{source.names[place]} ")

    numbers = range(len(source))
    quiet = len(source) < 1000
    return list(tqdm(prefetched(attempt, numbers), "pictures", len(source), unit="picture", disable=quiet))


def _sift(
    source: Source, findings: Sequence[Any], frames: list[tuple[int, int]]
) -> tuple[list[Sample], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return samples and rows of the usable pictures, and what was skipped and why.

    Raises:
        InputError: too much is skipped, or everything.
    """
    samples, rows, skipped = [], [], []
    for place, (row, found) in enumerate(zip(source.rows, findings)):
        captions = captions_of(row)
        reason = captions if isinstance(captions, str) else found
        if isinstance(reason, str):
            skipped.append({"place": place, "name": source.names[place], "reason": reason})
            continue
        digest, width, height = found
        samples.append(Sample(place, digest, (width, height), nearest(width, height, frames)))
        rows.append({**row, "captions": captions})
    if not samples or len(skipped) > max(1, MAX_BAD_SHARE * len(source)):
        raise InputError(
            f"{source.place}: {len(skipped)} of {len(source)} rows are unusable (at most 1 % may be), first"
            f" {skipped[0]['name']}: {skipped[0]['reason']}; mend or remove them"
        )
    return samples, rows, skipped


def captions_of(row: dict[str, Any]) -> list[str] | str:
    """Return the captions of a row, or what is wrong with them."""
    captions = row["captions"] if isinstance(row["captions"], list) else [row["captions"]]
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        return "no caption"
    longest = max(map(len, captions))
    if longest > MAX_PROMPT_LENGTH:
        return f"a caption of {longest} characters (at most {MAX_PROMPT_LENGTH})"
    return "a caption with a NUL character" if any("\0" in caption for caption in captions) else captions


def _decode(source: Source, place: int) -> tuple[str, Image.Image]:
    """Return the SHA-256 of an encoded picture, and the picture as RGBA.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    name = source.names[place]
    try:
        data = source.read(place)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror or error})") from error
    if not data:
        raise ValueError(f"{name} is empty (0 bytes)")
    return hashlib.sha256(data).hexdigest(), decode_rgba(data, name)


def _framed(image: Image.Image, frame: tuple[int, int]) -> np.ndarray:
    return np.asarray(fit(image, *frame))


def _stamp(source: Source) -> str:
    """Return what changes when pictures may have changed: a hash of names, and of sizes and times of files."""
    digest = hashlib.sha256(json.dumps(list(source.names)).encode())
    for file in source.files:
        status = file.stat() if file.exists() else None
        digest.update(f"{file}\0{status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another place") from error
