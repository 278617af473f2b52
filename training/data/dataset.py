"""Captioned pictures ready to train on: each examined once, bad ones skipped and reported, decoded when asked for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.errors import InputError, shown, suggest
from latentdiff.files import make_folder, write_file
from latentdiff.images import fit
from latentdiff.prompts import MAX_PROMPT_LENGTH

from ..config import DataConfig
from .batch_order import BatchOrder
from .buckets import bucket_sizes, nearest
from .examine import examine, examined, read_image, save_examined
from .image_info import ImageInfo, info_of
from .remarks import remarks
from .sample import Sample
from .source import MissingSplitError, Source
from .sources import open_source

# Above this share of unusable rows, and more than one, a data set is refused.
MAX_BAD_SHARE = 0.01
# Sets whose pictures take no more than this are decoded once and held in memory.
IN_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and what is known of each.

    Attributes:
        images: images[i] is (H, W, 4) uint8, RGBA, not premultiplied: an array (N, H, W, 4), or `LazyImages`.
        rows: N metadata rows; each has "captions", a list of at least one string.
        samples: N, one for each row.
        skipped: "place", "name" and "reason" of every row left out.
        apart: how many rows are held out of these.
        repeats: `DataConfig.repeats`.
    """

    images: Any
    rows: list[dict[str, Any]]
    samples: list[Sample]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    apart: int = 0
    repeats: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

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
        total = len(self.samples) + len(self.skipped) + self.apart
        return BatchOrder(places, groups, total, np.array([self._repeats(row) for row in self.rows]))

    def _repeats(self, row: Mapping[str, Any]) -> int:
        return math.prod(values.get(str(row.get(column)), 1) for column, values in self.repeats.items())


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
        with self._decoded(index) as image:
            return _framed(image, self.samples[index].frame)

    def windows(self, index: int, corners: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return what the frame of one picture shows of it, scaled to cover that, at some places.

        Args:
            corners: rows and columns of the scaled picture that are left out above and at the left of each.

        Returns:
            RGBA, each (H, W, 4) uint8.
        """
        with self._decoded(index) as image:
            return [_window(image, self.samples[index], corner) for corner in corners]

    @contextmanager
    def _decoded(self, index: int) -> Iterator[Image.Image]:
        sample = self.samples[index]
        with ExitStack() as stack:
            try:
                digest, image = stack.enter_context(read_image(self.source, sample.place))
            except ValueError as error:
                raise InputError(f"{self.source.place}: a picture has changed while it is in use: {error}") from error
            if digest != sample.digest:
                name = self.source.names[sample.place]
                raise InputError(f"{self.source.place}: a picture has changed while it is in use: {name}; start again")
            yield image


def load_images(
    config: DataConfig, split: str = "train", cache: Path | None = None, most: int | None = None
) -> CaptionedImages:
    """Decode the pictures of one split, squares of data.size, whatever the size of the set; none is held out.

    Args:
        cache: folder of what is kept of remote shards; None keeps nothing.
        most: how many rows are looked at, the first ones; all when None.

    Raises:
        InputError: see `open_images`.
    """
    source = open_source(config, split, cache)
    if most is not None:
        source = source.subset(range(min(most, len(source))))
    return _in_memory(source, [(config.size, config.size)])


def open_lazily(config: DataConfig, split: str, cache: Path) -> CaptionedImages | None:
    """Open the pictures of one split, squares of data.size, to be read whenever they are asked for; None if it is not.

    Args:
        cache: folder of what is kept, as that of `open_images`.

    Raises:
        InputError: see `open_images`.
    """
    source = _split_of(config, split)
    return None if source is None else _lazy(source, [(config.size, config.size)], cache)


def read_captions(config: DataConfig, cache: Path | None = None) -> list[list[str]]:
    """Return the captions of every row that has usable ones; no picture is looked at.

    Args:
        cache: folder of what is kept of remote shards; None keeps nothing.
    """
    source = open_source(config, cache=cache)
    found = (captions_of(row, source.uncaptioned) for row in source.rows)
    return [captions for captions in found if not isinstance(captions, str)]


def open_held_out(config: DataConfig, cache: Path, most: int, split: str = "validation") -> CaptionedImages | None:
    """Decode up to `most` pictures to measure by, evenly chosen, squares of data.size; None where there are none.

    The validation pictures are the share data.held_out of all, or the split of that name where the share is 0.

    Args:
        cache: folder of what is kept, as that of `open_images`.

    Raises:
        InputError: the pictures are there and cannot be used.
    """
    squares = [(config.size, config.size)]
    if config.held_out and split == "validation":
        source = open_source(config, cache=cache)
        samples, _, _ = _sift(source, examined(source, cache), squares)
        places = [sample.place for sample in samples if is_held_out(sample.digest, config.held_out)]
    elif (found := _split_of(config, split)) is not None:
        source, places = found, list(range(len(found)))
    else:
        return None
    chosen = np.linspace(0, len(places) - 1, min(len(places), most)).round().astype(int)
    return _in_memory(source.subset([places[number] for number in chosen]), squares)


def is_held_out(digest: str, share: float) -> bool:
    """Say whether a picture belongs to the share that is held out: by its bytes alone, so copies stay together.

    Args:
        digest: SHA-256 of the encoded picture.
    """
    return int(digest[:8], 16) < share * 2**32


def open_images(
    config: DataConfig, batch_size: int, folder: Path, cache: Path | None = None, multiple: int = 8
) -> CaptionedImages:
    """Open the captioned pictures to train on.

    Each picture is read and decoded once to see whether it can be. Those of a large or remote set, or of which random
    windows are seen, are not held in memory but read whenever they are asked for; what was found of them is kept. What
    was skipped is named in skipped.jsonl.

    Args:
        folder: of the run.
        cache: folder of what is kept; in that of the run when None.
        multiple: what the widths and heights of buckets are multiples of, in pixels.

    Raises:
        InputError: nothing of a known kind, a missing column, no picture left, more than one picture and more than
            1 % of all broken or without caption, data.held_out beside a validation split or of too few pictures, or
            data.repeats names what no picture has.
        StorageError: a folder cannot be written, or remote shards cannot be read.
    """
    cache = cache or folder / "cache"
    source = open_source(config, cache=cache)
    if config.held_out and _split_of(config, "validation") is not None:
        raise InputError(
            f"{source.place} has a validation split, and data.held_out is {config.held_out:g}; set it to 0 to measure "
            "by the split, or remove that"
        )
    frames = bucket_sizes(config.size, multiple) if config.buckets else [(config.size, config.size)]
    large = len(source) * config.size**2 * 4 > IN_MEMORY_BYTES
    if large or source.findings is not None or config.crop == "random":
        data = _lazy(source, frames, cache)
    else:
        data = _in_memory(source, frames, cache if config.held_out else None)
    if config.zoom > 1:
        samples = [replace(sample, zoom=config.zoom) for sample in data.samples]
        data = replace(data, samples=samples, images=LazyImages(source, samples))
    if config.held_out:
        data = _trained_on(data, config.held_out, source.place)
    data = replace(data, repeats=config.repeats)
    for column, value in ((column, value) for column, values in config.repeats.items() for value in values):
        if all(str(row.get(column)) != value for row in data.rows):
            known = {str(row[column]) for row in data.rows if row.get(column) is not None}
            raise InputError(f"data.repeats: no picture has {shown(column)} {shown(value)}{suggest(value, known)}")
    for line in remarks(source, data.samples, config.crop == "random"):
        print(line, file=sys.stderr)
    if data.skipped:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in data.skipped]
        make_folder(folder)
        write_file(folder / "skipped.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))
        print(f"{len(data.skipped)} of {len(source)} pictures are skipped: {folder}/skipped.jsonl", file=sys.stderr)
    if len(data) < batch_size:
        print(f"{len(data)} pictures are fewer than a batch of {batch_size}: batches repeat some", file=sys.stderr)
    return data


def composite(rgba: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """Lay RGBA pictures (..., 4) uint8 on one colour (three values 0..255): RGB (..., 3) uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(background, dtype=np.float32) * (1 - alpha)
    return (mixed + 0.5).astype(np.uint8)


def _split_of(config: DataConfig, split: str) -> Source | None:
    try:
        return open_source(config, split)
    except MissingSplitError:
        return None


def _trained_on(data: CaptionedImages, share: float, place: str) -> CaptionedImages:
    """Leave out the pictures that are held out.

    Raises:
        InputError: either part is empty.
    """
    kept = [n for n, sample in enumerate(data.samples) if not is_held_out(sample.digest, share)]
    apart = len(data) - len(kept)
    if not kept or not apart:
        lacking, remedy = ("measure by", "raise") if kept else ("train on", "lower")
        raise InputError(
            f"{place}: data.held_out {share:g} of {len(data)} pictures leaves none to {lacking}; {remedy} it"
        )
    samples, images = [data.samples[n] for n in kept], data.images
    if isinstance(images, LazyImages):
        images = replace(images, samples=samples)
    else:
        images = images[kept] if isinstance(images, np.ndarray) else [images[n] for n in kept]
    return CaptionedImages(images, [data.rows[n] for n in kept], samples, data.skipped, apart)


def _in_memory(source: Source, frames: list[tuple[int, int]], cache: Path | None = None) -> CaptionedImages:
    """Decode all pictures now.

    Args:
        cache: where to keep what is found of them.
    """
    pictures: dict[int, np.ndarray] = {}

    def read_info(place: int) -> ImageInfo:
        with read_image(source, place) as (digest, image):
            pictures[place] = _framed(image, nearest(*image.size, frames))
            return info_of(digest, image)

    findings = examine(source, read_info)
    if cache is not None:
        save_examined(findings, source, cache)
    samples, rows, skipped = _sift(source, findings, frames)
    images = [pictures.pop(sample.place) for sample in samples]
    return CaptionedImages(np.stack(images) if len(frames) == 1 else images, rows, samples, skipped)


def _lazy(source: Source, frames: list[tuple[int, int]], cache: Path) -> CaptionedImages:
    samples, rows, skipped = _sift(source, examined(source, cache), frames)
    return CaptionedImages(LazyImages(source, samples), rows, samples, skipped)


def _sift(
    source: Source, findings: Sequence[Any], frames: list[tuple[int, int]]
) -> tuple[list[Sample], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return samples and rows of the usable pictures, and what was skipped and why.

    Raises:
        InputError: too much is skipped, or everything.
    """
    samples, rows, skipped = list[Sample](), list[dict[str, Any]](), list[dict[str, Any]]()
    for place, (row, found) in enumerate(zip(source.rows, findings)):
        captions = captions_of(row, source.uncaptioned)
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
            f" {shown(skipped[0]['name'])[1:-1]}: {skipped[0]['reason'][:300]}; mend or remove them"
        )
    return samples, rows, skipped


def captions_of(row: dict[str, Any], uncaptioned: bool = False) -> list[str] | str:
    """Return the captions of a row, or what is wrong with them.

    Args:
        uncaptioned: whether they are empty because nothing is known of any picture of the source.
    """
    if isinstance(row["captions"], dict) and "reason" in row["captions"]:
        return f"no caption ({row['captions']['reason']})"
    captions = row["captions"] if isinstance(row["captions"], list) else [row["captions"]]
    if not captions or not all(isinstance(caption, str) and (uncaptioned or caption.strip()) for caption in captions):
        return "no caption"
    longest = max(map(len, captions))
    if longest > MAX_PROMPT_LENGTH:
        return f"a caption of {longest} characters (at most {MAX_PROMPT_LENGTH})"
    if any("\0" in caption for caption in captions):
        return "a caption with a NUL character"
    broken = any("\ud800" <= sign <= "\udfff" for caption in captions for sign in caption)
    return "a caption with half a character (a lone surrogate)" if broken else captions


def _framed(image: Image.Image, frame: tuple[int, int]) -> np.ndarray:
    return np.asarray(fit(image, *frame))


def _window(image: Image.Image, sample: Sample, corner: tuple[int, int]) -> np.ndarray:
    """Cut a window out of a picture scaled to cover its frame: the same pixels, but no others are ever scaled.

    Of a thin picture all the others may be a thousand times as many.
    """
    sides = []
    for own, other, length, beside, first, frame in zip(
        image.size, image.size[::-1], sample.covering, sample.covering[::-1], corner[::-1], sample.frame
    ):
        seen = min(own, other * length / beside)  # what is scaled of a side, as the scaled one is in whole pixels
        scale, start = seen / length, (own - seen) / 2
        low, high = start + first * scale, min(own, start + (first + frame) * scale)
        reach = math.ceil(3 * max(scale, 1)) + 1  # of the filter
        sides.append((low, high, max(0, math.floor(low) - reach), min(own, math.ceil(high) + reach)))
    (left, right, first_column, end_column), (top, bottom, first_row, end_row) = sides
    part = image.crop((first_column, first_row, end_column, end_row))
    box = (left - first_column, top - first_row, right - first_column, bottom - first_row)
    return np.asarray(part.resize(sample.frame, Image.Resampling.LANCZOS, box=box))
