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
    expected = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert found == pytest.approx(expected, rel=1e-7)
    again = frechet_distance(np.zeros(12), basis * b @ basis.T, mean, basis * a @ basis.T)
    assert again == pytest.approx(expected, rel=1e-7)


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


@pytest.mark.parametrize(("n", "m"), [(40, 30), (60, 60), (61, 30)])
def test_frechet_distance_of_fewer_pictures_than_features(n: int, m: int) -> None:
    """Without covariances, or with them where there are more pictures, it is the same."""
    a, b = features(n, 60, 1), features(m, 60, 2, 0.3)
    moments = [part for x in (a, b) for part in (x.mean(0), np.cov(x, rowvar=False))]
    assert frechet(a, b, groups=1).value == pytest.approx(frechet_distance(*moments), rel=1e-6)


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


@pytest.mark.filterwarnings("ignore")  # of scipy's matrix root, which both use as it was
def test_distances_are_those_of_torch_fidelity() -> None:
    """On the same features: of overlapping sets, of unequal size, and of fewer pictures than features."""
    pytest.importorskip("torch_fidelity")
    metric_fid, metric_kid, metric_prc = (
        pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "prc")
    )
    for a, b in (
        (features(300, 16, 1), features(300, 16, 2, 0.3)),
        (features(250, 12, 3), features(400, 12, 4)),
        (features(60, 100, 5), features(60, 100, 6, 0.1)),
    ):
        statistics = [metric_fid.fid_features_to_statistics(torch.tensor(x)) for x in (a, b)]
        fid = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        assert frechet(a, b).value == pytest.approx(float(fid), rel=1e-4, abs=1e-4)
        prc = metric_prc.prc_features_to_metric(
            *(torch.tensor(a), torch.tensor(b)), prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=True, verbose=False
        )
        found = precision_recall(a, b)
        assert (found.precision.value, found.recall.value) == pytest.approx((prc["precision"], prc["recall"]), abs=1e-6)
        if len(a) == len(b):  # theirs is of subsets of one size: all pictures, once
            options = {"kid_subsets": 1, "kid_subset_size": len(a), "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
            options |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}
            kid = metric_kid.kid_features_to_metric(torch.tensor(a), torch.tensor(b), **options)
            expected = float(kid["kernel_inception_distance_mean"])
            assert kernel_distance(a, b).value == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # as above
def test_distances_are_those_of_clean_fid() -> None:
    reference = pytest.importorskip("cleanfid.fid")
    a, b = features(300, 16, 1), features(300, 16, 2, 0.3)
    moments = [one for x in (a, b) for one in (x.mean(0), np.cov(x, rowvar=False))]
    assert frechet(a, b).value == pytest.approx(float(reference.frechet_distance(*moments)), rel=1e-4)
    theirs = reference.kernel_distance(a, b, num_subsets=1, max_subset_size=300)
    assert kernel_distance(a, b).value == pytest.approx(theirs, rel=1e-4)


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
