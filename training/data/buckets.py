"""Sizes of about one area for pictures of every shape, so that none is distorted and little is cut off."""

from __future__ import annotations

import math

LONGEST = 2.0  # side of a bucket, in sides of the square: shapes up to 4:1


def bucket_sizes(side: int, multiple: int) -> list[tuple[int, int]]:
    """Return the widths and heights of all buckets: multiples of `multiple`, of at most the area side x side.

    Args:
        side: of the square of the same area, in pixels.
        multiple: what widths and heights are multiples of; at most `side`.

    Source: Podell et al. 2023, 2307.01952, appendix I.
    """
    longest = int(LONGEST * side) // multiple
    found = {(side // multiple * multiple,) * 2}
    for width in range(1, longest + 1):
        height = side * side // (width * multiple) // multiple
        if 0 < height <= longest:
            found |= {(width * multiple, height * multiple), (height * multiple, width * multiple)}
    areas = {shape: shape[0] * shape[1] for shape in found}
    return sorted(shape for shape in found if areas[shape] >= 0.7 * max(areas.values()))


def nearest(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the size whose shape is nearest to that of a picture of width x height, by their ratio."""
    shape = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - shape), -size[0] * size[1], size))


def covering_size(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height that a picture of `size` has when it is scaled to cover a frame, in whole pixels."""
    if frame[0] * size[1] >= frame[1] * size[0]:
        return frame[0], size[1] * frame[0] // size[0]
    return size[0] * frame[1] // size[1], frame[1]


def crop_corner(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Return how much is cut off above and at the left when a picture is scaled to cover a frame, in scaled pixels.

    Args:
        size: width and height of the picture.
        frame: width and height of what is kept of its middle.
    """
    scale = max(frame[0] / size[0], frame[1] / size[1])
    return round((size[1] * scale - frame[1]) / 2), round((size[0] * scale - frame[0]) / 2)
