"""Where the things of a picture are: its ground is estimated, and what differs from that is put together to things."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from latentdiff.evaluate.compose.grounds import GROUNDS, paint_ground

__all__ = ["Region", "find_regions"]

SIDE = 128  # pixels at which pictures are looked at
COARSE = 64  # at which grounds are compared
PAINTINGS = 16  # of each ground that has chance in it
FAR = 60.0  # distance in sRGB beyond which it does not matter how far colours are apart
PLAIN = 40.0  # mean distance from the nearest ground above which the border alone says what the ground is
DIFFERENT = 36.0  # distance in sRGB from its ground at which a pixel is of a thing
SMALLEST = 0.002  # share of the picture of a thing's part
PART = 0.15  # share of the largest thing's area below which a region is part of the nearest one
OVERLAP = 0.25  # share of the smaller one's box from which two regions are parts of one thing

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Region:
    """One thing.

    Attributes:
        box: left, top, right and bottom, in pixels of the scaled picture.
        mask: its pixels, (SIDE, SIDE) bool.
    """

    box: Box
    mask: np.ndarray

    @property
    def center(self) -> tuple[float, float]:
        """Return x and y of the middle of its box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def find_regions(picture: Image.Image) -> tuple[np.ndarray, str, list[Region]]:
    """Return the picture scaled to SIDE (SIDE, SIDE, 3) uint8, the ground that it fits best, and the things on it.

    Args:
        picture: square, of any size; its transparent parts have been filled.
    """
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
    ground, distance = nearest_ground(picture)
    found = GROUNDS[ground]
    if found.paint is None or distance > PLAIN:
        mask = _apart(pixels, np.median(_border(pixels), axis=0)[None, None, None])
    else:
        mask = _opened(_apart(pixels, _paintings(ground, SIDE)))
    return pixels, ground, _merged(_components(mask))


def nearest_ground(picture: Image.Image) -> tuple[str, float]:
    """Return the ground whose nearest painting a picture differs least from, and by how much, in sRGB."""
    small = picture.convert("RGB").resize((COARSE, COARSE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)
    apart = {}
    for name in GROUNDS:
        distances = np.linalg.norm(_paintings(name, COARSE) - pixels, axis=-1)  # (K, S, S)
        apart[name] = float(np.minimum(distances, FAR).mean(axis=(1, 2)).min())
    best = min(apart, key=lambda name: apart[name])
    return best, apart[best]


@lru_cache(maxsize=64)
def _paintings(name: str, side: int) -> np.ndarray:
    """Return examples of a ground (K, side, side, 3)."""
    count = 1 if GROUNDS[name].paint is None else PAINTINGS
    painted = [paint_ground(GROUNDS[name], side, np.random.default_rng(seed)) for seed in range(count)]
    return np.stack([np.asarray(one, dtype=np.float32) for one in painted])


def _border(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), *pixels[:, [0, 1, -2, -1]]])


def _apart(pixels: np.ndarray, grounds: np.ndarray) -> np.ndarray:
    """Return which pixels (H, W) differ from all grounds (K, H, W, 3)."""
    seen = pixels.astype(np.float32)
    nearest = np.full(pixels.shape[:2], np.inf, dtype=np.float32)
    for ground in grounds:
        nearest = np.minimum(nearest, np.linalg.norm(seen - ground, axis=-1))
    return nearest > DIFFERENT


def _opened(mask: np.ndarray) -> np.ndarray:
    """Remove spots and lines: stars, snow, rain, and the edges of bands."""
    from scipy.ndimage import binary_opening

    return np.asarray(binary_opening(mask, np.ones((4, 4), dtype=bool)))


def _components(mask: np.ndarray) -> list[Region]:
    """Return what hangs together, the largest first, without specks."""
    from scipy.ndimage import binary_fill_holes, find_objects, label

    labels, _ = label(binary_fill_holes(mask), np.ones((3, 3), dtype=bool))
    regions = []
    for number, (rows, columns) in enumerate(find_objects(labels), 1):
        own = labels == number
        if own.sum() >= SMALLEST * mask.size:
            regions.append(Region((columns.start, rows.start, columns.stop, rows.stop), own))
    return sorted(regions, key=lambda region: -int(region.mask.sum()))


def _merged(regions: list[Region]) -> list[Region]:
    """Put the parts of one thing together: regions whose boxes overlap, and small ones with the nearest."""
    regions = list(regions)
    while (pair := _overlapping(regions)) is not None:
        second = regions.pop(pair[1])
        regions[pair[0]] = _union(regions[pair[0]], second)
    largest = max((int(region.mask.sum()) for region in regions), default=0)
    whole = [region for region in regions if region.mask.sum() >= PART * largest]
    for part in (region for region in regions if region.mask.sum() < PART * largest):
        near = min(range(len(whole)), key=lambda n: _gap(whole[n].box, part.box))
        whole[near] = _union(whole[near], part)
    return whole


def _overlapping(regions: list[Region]) -> tuple[int, int] | None:
    for first in range(len(regions)):
        for second in range(first + 1, len(regions)):
            one, other = regions[first].box, regions[second].box
            width = min(one[2], other[2]) - max(one[0], other[0])
            height = min(one[3], other[3]) - max(one[1], other[1])
            if width > 0 and height > 0 and width * height > OVERLAP * min(_area(one), _area(other)):
                return first, second
    return None


def _union(one: Region, other: Region) -> Region:
    low = (min(a, b) for a, b in zip(one.box[:2], other.box[:2]))
    high = (max(a, b) for a, b in zip(one.box[2:], other.box[2:]))
    left, top, right, bottom = (*low, *high)
    return Region((left, top, right, bottom), one.mask | other.mask)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _gap(one: Box, other: Box) -> float:
    across = max(0, one[0] - other[2], other[0] - one[2])
    down = max(0, one[1] - other[3], other[1] - one[3])
    return float(np.hypot(across, down))
