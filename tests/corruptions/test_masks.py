"""Masks of training: each kind is what it is called, covers what it should, and follows from its generator alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy import ndimage

from latentdiff.corruptions.masks import (
    BORDER,
    COVERED,
    KINDS,
    draw_blobs,
    draw_borders,
    draw_boxes,
    draw_mask,
    draw_strokes,
)


def drawn(count: int, height: int, width: int, full: float = 0.0) -> Iterator[np.ndarray]:
    for seed in range(count):
        yield draw_mask(np.random.default_rng([3, seed]), height, width, full)


def pieces(mask: np.ndarray) -> int:
    return ndimage.label(mask, np.ones((3, 3)))[1]


def roughness(mask: np.ndarray) -> float:
    """Length of the outline, in pixels along rows and columns, over the root of the area."""
    edges = np.diff(mask, axis=0).sum() + np.diff(mask, axis=1).sum()
    return float(edges / mask.sum() ** 0.5)


@pytest.mark.parametrize("size", [(64, 64), (40, 96), (8, 8), (8, 400)])
def test_masks_cover_something_and_leave_something(size: tuple[int, int]) -> None:
    shares = []
    for mask in drawn(200, *size):
        assert mask.shape == size and mask.dtype == np.bool_
        shares.append(mask.mean())
    assert min(shares) > 0 and max(shares) < 1
    assert 0.3 < np.mean(shares) < 0.5
    assert np.quantile(shares, 0.1) < 0.25 and np.quantile(shares, 0.9) > 0.55


def test_a_mask_follows_from_the_generator_alone() -> None:
    first, again = list(drawn(20, 64, 64, 0.1)), list(drawn(20, 64, 64, 0.1))
    assert all(np.array_equal(*pair) for pair in zip(first, again))
    assert len({mask.tobytes() for mask in first if not mask.all()}) == sum(not mask.all() for mask in first)


def test_everything_is_covered_as_often_as_asked() -> None:
    assert all(mask.all() for mask in drawn(20, 16, 16, full=1.0))
    assert np.mean([mask.all() for mask in drawn(400, 16, 16, full=0.25)]) == pytest.approx(0.25, abs=0.05)


def test_all_kinds_are_drawn_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(KINDS, 0)
    for name, draw in list(KINDS.items()):

        def counted(*arguments: object, name: str = name, draw: object = draw) -> np.ndarray:
            counts[name] += 1
            return draw(*arguments)  # type: ignore[operator]

        monkeypatch.setitem(KINDS, name, counted)
    for _ in drawn(400, 16, 16):
        pass
    assert all(70 < count < 140 for count in counts.values())


def test_boxes_are_one_to_three_rectangles() -> None:
    numbers = set()
    for seed in range(100):
        mask = draw_boxes(np.random.default_rng(seed), 48, 64)
        labels, count = ndimage.label(mask)
        boxes = ndimage.find_objects(labels)
        numbers.add(count)
        if count == 3:  # apart from each other
            assert all(mask[box].all() for box in boxes)
    assert numbers == {1, 2, 3}


def test_borders_leave_one_rectangle_and_are_up_to_four() -> None:
    numbers = set()
    for seed in range(100):
        mask = draw_borders(np.random.default_rng(seed), 48, 64)
        kept = ndimage.find_objects((~mask).astype(int))[0]
        assert not mask[kept].any()
        assert kept[0].stop - kept[0].start >= 48 * (1 - 2 * BORDER)
        numbers.add(sum([mask[0].all(), mask[-1].all(), mask[:, 0].all(), mask[:, -1].all()]))
    assert numbers == {1, 2, 3, 4}


def test_strokes_have_round_ends_and_thicknesses_of_their_own() -> None:
    thickest = []
    for seed in range(60):
        mask = draw_strokes(np.random.default_rng(seed), 128, 128)
        thickest.append(ndimage.distance_transform_edt(mask).max())
        assert COVERED[0] <= mask.mean()
        # Opening by a disk takes the corners off whatever has any; what is as round as a brush loses next to nothing.
        y, x = np.ogrid[-3:4, -3:4]
        assert (mask & ~ndimage.binary_opening(np.pad(mask, 4, "edge"), y**2 + x**2 <= 9)[4:-4, 4:-4]).mean() < 0.01
    assert max(thickest) > 2 * min(thickest)


def test_blobs_are_mostly_one_smooth_piece() -> None:
    masks = [draw_blobs(np.random.default_rng(seed), 64, 64) for seed in range(100)]
    assert np.median([pieces(mask) for mask in masks]) == 1
    # A circle has an outline of 8 / sqrt(pi), about 4.5, and noise of single pixels one of 64 and more.
    assert np.quantile([roughness(mask) for mask in masks], 0.95) < 9


def test_a_larger_picture_has_the_same_masks_in_finer_detail() -> None:
    for name, draw in KINDS.items():
        shares = [[draw(np.random.default_rng(seed), side, side).mean() for seed in range(40)] for side in (64, 256)]
        assert np.mean(shares[0]) == pytest.approx(np.mean(shares[1]), abs=0.05), name
