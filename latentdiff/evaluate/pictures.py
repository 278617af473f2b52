"""Sets of generated pictures on disk: named by what makes them, so that a broken-off evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import InputError
from latentdiff.files import make_folder
from latentdiff.images import open_image, pixel_hash, to_tensor
from latentdiff.pipeline import Pipeline

__all__ = ["Drawing", "Item", "generate", "load_pictures"]

NAME_DIGITS = 20


@dataclass(frozen=True)
class Item:
    """A picture that is asked for.

    Attributes:
        prompt: what it is to show.
        seed: of its noise.
        truth: what a metric checks it by.
        inputs: pictures that it is made from, as arguments of a call: `image`, and `mask`; see `tasks.spoilt`.
    """

    prompt: str
    seed: int
    truth: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Image.Image] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Tells it from other items, and is the same for every model."""
        return f"{self.prompt} #{self.seed}"


def path_of(item: Item, folder: Path, maker: Mapping[str, Any]) -> Path:
    """Return where the picture of an item is.

    Args:
        maker: what else it depends on: hash of the model and settings, JSON-ready.
    """
    inputs = {name: pixel_hash(picture) for name, picture in item.inputs.items()}
    tree = {"prompt": item.prompt, "seed": item.seed, **inputs, **maker}
    return folder / f"{hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:NAME_DIGITS]}.png"


@dataclass(frozen=True)
class Drawing:
    """A set of pictures to be drawn.

    Attributes:
        items: what is drawn.
        folder: where the pictures go.
        maker: what else they depend on; see `path_of`.
        settings: of each call, without prompt and seed.
        batch_size: pictures of a call; one where they are made from pictures.
    """

    items: Sequence[Item]
    folder: Path
    maker: Mapping[str, Any]
    settings: Mapping[str, Any]
    batch_size: int

    @property
    def paths(self) -> list[Path]:
        """Where the pictures of all items are, in their order."""
        return [path_of(item, self.folder, self.maker) for item in self.items]


def generate(pipe: Pipeline, drawing: Drawing, share: tuple[int, int] = (0, 1), progress: bool = False) -> list[Path]:
    """Draw the pictures that are not there yet and return the paths of all, in the order of their items.

    Batches are of the whole list, whatever is there of it: a picture is the same to the bit however often it began.

    Args:
        share: which batches are drawn: number of this process, and how many there are.

    Raises:
        InputError: the model draws values that are not finite, or the settings do not fit it.
        StorageError: a picture cannot be written.
    """
    items, paths = drawing.items, drawing.paths
    make_folder(drawing.folder)
    own, processes = share
    batch_size = 1 if any(item.inputs for item in items) else drawing.batch_size
    batches = list(_batches(items, batch_size))[own::processes]
    there = {number: _is_whole(paths[number]) for numbers in batches for number in numbers}
    with tqdm(total=len(there), initial=sum(there.values()), unit="picture", disable=not progress) as bar:
        for numbers in batches:
            if all(there[number] for number in numbers):
                continue
            first, prompts = items[numbers[0]], [items[number].prompt for number in numbers]
            options: dict[str, Any] = {"prompt_weights": False, **drawing.settings, **first.inputs}  # as plain text
            result = pipe(prompts, seed=first.seed, batch_size=batch_size, **options)
            for place, number in enumerate(numbers):
                result.write(place, paths[number])
                bar.update(not there[number])
    return paths


def _batches(items: Sequence[Item], batch_size: int) -> Iterator[list[int]]:
    """Yield numbers of items whose seeds rise by one, `batch_size` at most: what one call draws."""
    runs = groupby(range(len(items)), key=lambda number: items[number].seed - number)
    for _, run in runs:
        numbers = list(run)
        yield from (numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size))


def load_pictures(paths: Sequence[Path]) -> Tensor:
    """Return pictures (N, 3, H, W) in [-1, 1], transparent parts over white.

    Raises:
        InputError: one is broken or of another size than the first.
    """
    images: list[Image.Image] = []
    for path in paths:
        images.append(open_image(path))
        if images[-1].size != images[0].size:
            (width, height), (own_width, own_height) = images[0].size, images[-1].size
            raise InputError(
                f"{path} must be {width}x{height} as {paths[0].name} is, got {own_width}x{own_height}; "
                "measure pictures of one size"
            )
    return to_tensor(images)


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True
