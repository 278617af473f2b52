"""Bucket sizes: multiples, of about one area, and the nearest shape for every picture."""

import numpy as np
import pytest
from latentdiff.training.data.buckets import bucket_sizes, covering_size, crop_corner, nearest


@pytest.mark.parametrize(("side", "multiple"), [(64, 8), (64, 32), (512, 64), (1024, 64), (768, 8), (8, 8), (80, 64)])
def test_buckets_are_multiples_of_one_area(side: int, multiple: int) -> None:
    sizes = bucket_sizes(side, multiple)
    square = side // multiple * multiple
    assert (square, square) in sizes
    assert {size[::-1] for size in sizes} == set(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert 0.6 * square * square <= width * height <= side * side
        assert max(width, height) <= 2 * side


def test_pictures_lose_little() -> None:
    sizes = bucket_sizes(512, 64)
    for width, height in [(640, 480), (1920, 1080), (1080, 1920), (3000, 2000), (1000, 1000), (400, 1200)]:
        frame = nearest(width, height, sizes)
        scale = max(frame[0] / width, frame[1] / height)
        assert frame[0] * frame[1] / (width * height * scale**2) > 0.85
    assert nearest(640, 480, sizes) == (576, 448)
    assert nearest(10_000, 10, sizes) == max(sizes)


def test_the_corner_of_a_crop_is_in_scaled_pixels() -> None:
    assert crop_corner((640, 480), (576, 448)) == (0, 11)
    assert crop_corner((480, 640), (448, 576)) == (11, 0)
    assert crop_corner((64, 64), (64, 64)) == (0, 0)


def test_a_covering_picture_is_as_large_as_its_frame_on_one_side() -> None:
    assert covering_size((640, 480), (64, 64)) == (85, 64)
    assert covering_size((480, 640), (64, 64)) == (64, 85)
    assert covering_size((7, 7), (48, 48)) == (48, 48)
    for width in range(1, 60):
        for frame in ((40, 24), (24, 40), (31, 31)):
            over = np.subtract(covering_size((width, 37), frame), frame)
            assert over.min() == 0 and over.max() >= 0
