"""Masks for inpainting: which part of a picture is drawn anew, drawn at random from an explicit generator.

Large and wide ones, rectangles and chains of strokes of random thickness, as those of LaMa are (Suvorov et al. 2021,
arXiv 2109.07161, "Generation of masks during training"); besides, outlines like those of objects, and borders as
outpainting draws them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

# Least and greatest share of the picture that boxes, strokes and blobs cover.
COVERED = (0.1, 0.7)
# Greatest share of a side that one border takes, so that a quarter is kept between two.
BORDER = 0.375


def draw_mask(rng: np.random.Generator, height: int, width: int, full: float) -> np.ndarray:
    """Draw a mask, a pure function of the generator's state: a random kind of shape, or everything.

    Args:
        rng: moves on by as much as the shape needs.
        height, width: of the picture, at least 8 pixels.
        full: probability, 0 to 1, of a mask that covers everything, under which a network sees nothing of the picture
            and so keeps drawing from text alone. No other mask is full, and none is empty.

    Returns:
        (H, W) bool, True where the picture is drawn anew.
    """
    if rng.random() < full:
        return np.ones((height, width), dtype=bool)
    draw = list(KINDS.values())[rng.integers(len(KINDS))]
    while True:
        mask = draw(rng, height, width)
        if draw is draw_borders or COVERED[0] <= mask.mean() <= COVERED[1]:
            return mask


def draw_boxes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw one to three rectangles, wholly within the picture, the smaller the more there are."""
    mask, count = np.zeros((height, width), dtype=bool), rng.integers(1, 4)
    for _ in range(count):
        rows, columns = (max(1, round(side * rng.uniform(0.25, 1) / count**0.5)) for side in (height, width))
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        mask[top : top + rows, left : left + columns] = True
    return mask


def draw_strokes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw strokes of a brush until a random share is covered: random walks of random thickness with round ends."""
    image = Image.new("1", (width, height))
    brush, scale, wanted = ImageDraw.Draw(image), (height * width) ** 0.5, rng.uniform(COVERED[0], 0.55)
    while True:
        radius = max(1.0, scale * rng.uniform(0.025, 0.12))
        steps = int(rng.integers(2, 9))
        headings = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.8, steps).cumsum()
        lengths = scale * rng.uniform(0.05, 0.25, steps)
        walk = (lengths * np.stack([np.cos(headings), np.sin(headings)])).cumsum(axis=1)  # (2, steps)
        points = (np.array([[width], [height]]) * rng.random((2, 1)) + np.pad(walk, ((0, 0), (1, 0)))).T
        brush.line(points.ravel().tolist(), fill=1, width=round(2 * radius))
        for point in points:
            brush.circle(point.tolist(), radius, fill=1)
        mask = np.array(image)
        if mask.mean() >= wanted:
            return mask


def draw_blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw an outline like an object's: where smooth noise, raised around one place, is above a level."""
    cells = rng.normal(size=rng.integers(4, 8, 2)).astype(np.float32)
    noise = np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))
    y, x = (((np.arange(side) + 0.5) / side - rng.uniform(0.2, 0.8)) ** 2 for side in (height, width))
    field = noise - rng.uniform(8, 24) * (y[:, None] + x).astype(np.float32)
    covered = int(height * width * rng.uniform(*COVERED))
    return field > np.partition(field, -covered, axis=None)[-covered]


def draw_borders(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw what one to four sides of outpainting add around a picture."""
    mask = np.ones((height, width), dtype=bool)
    drawn = rng.permutation(4) < rng.integers(1, 5)
    top, bottom, left, right = (
        max(1, int(side * rng.uniform(1 / 16, BORDER))) * bool(on)
        for side, on in zip((height, height, width, width), drawn)
    )
    mask[top : height - bottom, left : width - right] = False
    return mask


KINDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "boxes": draw_boxes,
    "strokes": draw_strokes,
    "blobs": draw_blobs,
    "borders": draw_borders,
}
