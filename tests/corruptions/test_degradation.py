"""Degradations: each step against what it is by definition, all together seeded and clean where they should be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from latentdiff.corruptions.degradation import KERNELS, add_noise, blur, compress, degrade

RNG = np.random.default_rng(0)
PICTURE = ndimage.gaussian_filter(RNG.uniform(0, 255, (48, 64, 3)), (2, 2, 0)).astype(np.uint8)
PICTURE = ((PICTURE - 90.0) * 3).clip(0, 255).astype(np.uint8)


def error(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.square(first.astype(float) - second).mean() ** 0.5)


def clean(factor: int) -> list[np.ndarray]:
    size = (64 // factor, 48 // factor)
    return [np.asarray(Image.fromarray(PICTURE).resize(size, kernel)) for kernel in KERNELS]


@pytest.mark.parametrize("factor", [2, 4])
def test_without_strength_a_picture_is_downscaled_by_one_of_the_kernels(factor: int) -> None:
    used = set()
    for seed in range(40):
        small = degrade(PICTURE, factor, np.random.default_rng(seed), 0.0)
        same = [np.array_equal(small, one) for one in clean(factor)]
        assert sum(same) == 1
        used.add(same.index(True))
    assert used == set(range(len(KERNELS)))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_shape_and_type(factor: int) -> None:
    before = PICTURE.copy()
    for seed in range(20):
        small = degrade(PICTURE, factor, np.random.default_rng(seed), 1.0)
        assert small.shape == (48 // factor, 64 // factor, 3)
        assert small.dtype == np.uint8 and small.flags.c_contiguous and small.flags.writeable
    assert np.array_equal(PICTURE, before)


def test_a_picture_follows_from_the_generator_alone() -> None:
    first, again, other = (
        [degrade(PICTURE, 4, np.random.default_rng([start, seed]), 1.0) for seed in range(20)] for start in (1, 1, 2)
    )
    assert all(np.array_equal(*pair) for pair in zip(first, again))
    assert not any(np.array_equal(*pair) for pair in zip(first, other))


def test_more_strength_is_further_from_the_clean_picture() -> None:
    def mean_error(strength: float) -> float:
        pictures = [degrade(PICTURE, 4, np.random.default_rng(seed), strength) for seed in range(60)]
        return float(np.mean([min(error(picture, one) for one in clean(4)) for picture in pictures]))

    errors = [mean_error(strength) for strength in (0.0, 0.3, 0.6, 1.0)]
    assert errors[0] == 0
    assert all(1.5 * low < high for low, high in pairwise(errors))


def test_isotropic_blur_is_the_gaussian_filter() -> None:
    blurred = blur(PICTURE, np.array([2.3, 2.3]), 0.4)
    expected = ndimage.gaussian_filter(PICTURE.astype(float), (2.3, 2.3, 0), mode="mirror", truncate=6)
    assert np.abs(blurred - expected).max() < 1.5


def test_anisotropic_blur_is_along_its_axes_and_turns() -> None:
    expected = ndimage.gaussian_filter(PICTURE.astype(float), (0.5, 3.0, 0), mode="mirror", truncate=6)
    along_rows = blur(PICTURE, np.array([3.0, 0.5]), 0.0)
    # Below a standard deviation of a pixel the sampled kernel is not quite the Gaussian; half a pixel is.
    assert error(along_rows, expected) < 1.5
    assert np.array_equal(along_rows, blur(PICTURE, np.array([0.5, 3.0]), np.pi / 2))
    square = PICTURE[:48, :48]
    turned = blur(square.transpose(1, 0, 2), np.array([3.0, 0.5]), np.pi / 2).transpose(1, 0, 2)
    assert np.array_equal(turned, blur(square, np.array([3.0, 0.5]), 0.0))
    assert error(blur(square, np.array([3.0, 0.5]), 0.7), blur(square, np.array([3.0, 0.5]), -0.7)) > 1


def test_a_plain_picture_stays_under_blur_and_is_not_darker_at_its_edges() -> None:
    for value in (0, 100, 255):
        plain = np.full((10, 12, 3), value, dtype=np.uint8)
        assert np.array_equal(blur(plain, np.array([3.0, 1.0]), 0.3), plain)


def test_noise_has_the_deviation_asked_for() -> None:
    plain = np.full((100, 100, 3), 128, dtype=np.uint8)
    noise = add_noise(plain, 10.0, np.random.default_rng(0)) - 128.0
    assert noise.std() == pytest.approx(10, rel=0.03) and abs(noise.mean()) < 0.3
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.05
    gray = add_noise(plain, 10.0, np.random.default_rng(0), gray=True)
    assert np.array_equal(gray[..., 0], gray[..., 1]) and np.array_equal(gray[..., 0], gray[..., 2])
    assert gray.std() == pytest.approx(10, rel=0.03)


@pytest.mark.parametrize("gray", [False, True])
def test_shot_noise_grows_with_the_light(gray: bool) -> None:
    deviations = []
    for value in (0, 50, 200):
        plain = np.full((100, 100, 3), value, dtype=np.uint8)
        deviations.append(add_noise(plain, 12.0, np.random.default_rng(0), shot=True, gray=gray).std())
    assert deviations[0] == 0
    assert deviations[1:] == pytest.approx([12 * (50 / 255) ** 0.5, 12 * (200 / 255) ** 0.5], rel=0.03)


def test_lower_quality_loses_more() -> None:
    errors = [error(compress(PICTURE, quality), PICTURE) for quality in (95, 60, 30)]
    assert 0 < errors[0] < errors[1] < errors[2]
