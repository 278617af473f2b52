"""Distances between sets of features: closed forms, brute force, and other implementations on the same features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.errors import InputError
from latentdiff.evaluate import distances
from latentdiff.evaluate.distances import (
    frechet,
    frechet_distance,
    frechet_extrapolated,
    gaussian_distance,
    gaussian_kernel,
    kernel_distance,
    median_distance,
    precision_recall,
)


def features(n: int, size: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, size)) * np.linspace(0.5, 1.5, size) + shift


def test_frechet_distance_of_gaussians_with_known_moments() -> None:
    """Commuting covariances: |m|^2 + sum of (sqrt(a) - sqrt(b))^2 over their eigenvalues."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    a, b = rng.uniform(0.1, 3, 12), rng.uniform(0, 2, 12)
    b[:4] = 0  # singular, as of fewer pictures than features
    mean = rng.standard_normal(12)
    found = frechet_distance(mean, basis * a @ basis.T, np.zeros(12), basis * b @ basis.T)
    assert found == pytest.approx(np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-7)


def test_frechet_distance_is_that_of_torchmetrics_and_scipy() -> None:
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    a, b = features(300, 16, 1), features(200, 16, 2, 0.3)
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    (mean_a, cov_a), (mean_b, cov_b) = moments
    theirs = float(_compute_fid(*(torch.from_numpy(x) for x in (mean_a, cov_a, mean_b, cov_b))))
    root = np.trace(sqrtm(cov_a @ cov_b)).real
    assert frechet(a, b).value == pytest.approx(theirs, rel=1e-6)
    assert theirs == pytest.approx(np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b) - 2 * root, rel=1e-6)


def test_extrapolation_takes_the_bias_away() -> None:
    """Two sets of one distribution are at a distance of 0; of 400 pictures each the plain estimate is far off."""
    a, b = features(400, 16, 3), features(400, 16, 4)
    plain, extrapolated = frechet(a, b), frechet_extrapolated(a, b)
    assert plain.value > 0.3 and abs(extrapolated.value) < 0.3 * plain.value
    assert extrapolated.low < 0 < extrapolated.high
    shifted = frechet_extrapolated(a, features(400, 16, 4, 0.5))
    assert shifted.low < 16 * 0.25 < shifted.high


def brute_force(a: np.ndarray, b: np.ndarray, kernel: Any) -> float:
    n, m = len(a), len(b)
    k = kernel(np.concatenate([a, b]), np.concatenate([a, b]))
    np.fill_diagonal(k, 0)
    return k[:n, :n].sum() / (n * (n - 1)) + k[n:, n:].sum() / (m * (m - 1)) - 2 * k[:n, n:].mean()


def test_kernel_distances_and_their_jackknife_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK", 7)
    a, b = features(20, 5, 5), features(16, 5, 6, 0.4)
    cubic = lambda x, y: (x @ y.T / 5 + 1) ** 3  # noqa: E731
    estimate = kernel_distance(a, b)
    assert estimate.value == pytest.approx(brute_force(a, b, cubic), rel=1e-10)
    variance = 0.0
    for left_out in (
        [brute_force(np.delete(a, i, 0), b, cubic) for i in range(20)],
        [brute_force(a, np.delete(b, i, 0), cubic) for i in range(16)],
    ):
        variance += (len(left_out) - 1) * np.var(left_out)
    assert estimate.high - estimate.value == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-5)
    width = median_distance(b)
    found = gaussian_distance(a, b, width)
    assert found.value == pytest.approx(brute_force(a, b, lambda x, y: gaussian_kernel(x, y, width)), rel=1e-9)


def test_kid_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = features(120, 24, 7), features(120, 24, 8, 0.2)
    assert kernel_distance(a, b).value == pytest.approx(float(poly_mmd(torch.tensor(a), torch.tensor(b))), rel=1e-6)


def test_precision_and_recall_of_sets_with_known_overlap() -> None:
    """Uniform on two boxes that share a part: each figure is the share of its set in the common part."""
    rng = np.random.default_rng(9)
    real = rng.uniform(0, 1, (4000, 2)) * [4, 1]  # x from 0 to 4
    generated = rng.uniform(0, 1, (4000, 2)) * [2, 1] + [3, 0]  # x from 3 to 5
    found = precision_recall(generated, real)
    assert found.precision.value == pytest.approx(0.5, abs=0.02)
    assert found.recall.value == pytest.approx(0.25, abs=0.02)
    assert found.precision.low < found.precision.value < found.precision.high
    same = precision_recall(real, real)
    assert (same.precision.value, same.recall.value) == (1.0, 1.0)
    apart = precision_recall(real, real + 100)
    assert (apart.precision.value, apart.recall.value) == (0.0, 0.0)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    for a, b, message in (
        (features(2, 4, 0), features(9, 4, 0), "at least 3 pictures in each set, got 2"),
        (features(9, 4, 0), features(9, 5, 0), "of one network, got 4 and 5 values"),
    ):
        with pytest.raises(InputError, match=message):
            kernel_distance(a, b)
