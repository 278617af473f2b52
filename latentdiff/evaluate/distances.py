"""Distances between two sets of features: Frechet, kernel (KID, MMD), precision and recall.

All take features (n, D), one row a picture, and compute in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentdiff.errors import InputError
from latentdiff.evaluate.intervals import Estimate, Floats, grouped_jackknife, jackknifed, share

__all__ = [
    "PrecisionRecall",
    "frechet",
    "frechet_distance",
    "frechet_extrapolated",
    "gaussian_distance",
    "kernel_distance",
    "median_distance",
    "mmd",
    "precision_recall",
]

Kernel = Callable[[Floats, Floats], Floats]
"""Features (n, D) and (m, D) -> values of all pairs (n, m)."""

NEAREST = 3  # whose distance is the radius around a picture, in precision and recall
BLOCK = 4096  # rows of a distance matrix at once


def frechet_distance(mean_a: Floats, covariance_a: Floats, mean_b: Floats, covariance_b: Floats) -> float:
    """Return the squared Frechet distance of two Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The root's trace is taken of L^T C_b L with C_a = L L^T, which has the same eigenvalues and is symmetric, so that
    singular covariances (fewer pictures than features) need no correction.

    Args:
        mean_a, mean_b: (D,).
        covariance_a, covariance_b: (D, D).

    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, Eq. 6.
    """
    factor = _factor(covariance_a)
    product = np.linalg.eigvalsh(factor.T @ covariance_b @ factor)
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(product.clip(0)).sum()
    return float(np.square(mean_a - mean_b).sum() + trace)


def _factor(covariance: Floats) -> Floats:
    """Return L (D, D) with L L^T a covariance: Cholesky's, and of a singular one that of its eigenvectors."""
    try:
        return np.asarray(np.linalg.cholesky(covariance), np.float64)
    except np.linalg.LinAlgError:  # several times as fast as what follows
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(values.clip(0))


def frechet_of(a: Floats, b: Floats) -> float:
    """Return the squared Frechet distance of two sets of features (n, D) and (m, D).

    Of fewer pictures than features the trace of the root is found without covariances: it is the sum of the singular
    values of A B^T, of the centred features A / (n - 1)^(1/2) and B / (m - 1)^(1/2), whose squares are the eigenvalues
    of C_a C_b.
    """
    _require(a, b, 2)
    if max(len(a), len(b)) > a.shape[1]:
        return frechet_distance(*_moments(a), *_moments(b))
    (mean_a, one), (mean_b, other) = _centred(a), _centred(b)
    trace = np.square(one).sum() + np.square(other).sum() - 2 * np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + trace)


def _centred(features: Floats) -> tuple[Floats, Floats]:
    """Return the mean (D,) of features (n, D), and what is left of them, (n, D), over (n - 1)^(1/2)."""
    found = np.asarray(features, np.float64)
    mean = found.mean(axis=0)
    return mean, (found - mean) / np.sqrt(len(found) - 1)


def _moments(features: Floats) -> tuple[Floats, Floats]:
    """Return the mean (D,) and covariance (D, D) of features (n, D)."""
    found = np.asarray(features, np.float64)
    return found.mean(axis=0), np.cov(found, rowvar=False).reshape(2 * found.shape[1:])


def frechet(a: Floats, b: Floats, groups: int = 10) -> Estimate:
    """Return the squared Frechet distance of two sets with its interval at this n, of which it is a biased estimate."""
    _require(a, b, 2)
    return grouped_jackknife(frechet_of, a, b, groups=groups)


def frechet_extrapolated(a: Floats, b: Floats, seed: int = 0, groups: int = 10) -> Estimate:
    """Return the squared Frechet distance extrapolated to infinitely many pictures, with its interval.

    The distance of finite sets is larger by a term in 1 / n: twice that of the whole sets less that of their halves,
    each half against its counterpart, is free of it.

    Source: Chong and Forsyth 2020, arXiv 1911.07023, section 4, with a line through two sizes.
    """
    _require(a, b, 4 if groups < 2 else 6)  # two pictures at least in each half, where a group of one is left out too
    order = np.random.default_rng(seed)
    return grouped_jackknife(_extrapolate, a[order.permutation(len(a))], b[order.permutation(len(b))], groups=groups)


def _extrapolate(a: Floats, b: Floats) -> float:
    halves = [frechet_of(a[part::2], b[part::2]) for part in (0, 1)]
    return 2 * frechet_of(a, b) - sum(halves) / 2


def cubic_kernel(a: Floats, b: Floats) -> Floats:
    """Return (a . b / D + 1)^3 of all pairs, (n, m): the kernel of KID.

    Source: Binkowski et al. 2018, arXiv 1801.01401, section 4.
    """
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian_kernel(a: Floats, b: Floats, bandwidth: float) -> Floats:
    """Return exp(-|a - b|^2 / (2 bandwidth^2)) of all pairs, (n, m)."""
    return np.exp(-_squared_distances(a, b) / (2 * bandwidth**2))


def median_distance(features: Floats, most: int = 1000) -> float:
    """Return the median distance between two of some features (n, D), the usual bandwidth of a Gaussian kernel."""
    few = np.asarray(features[:most], np.float64)
    distances = np.sqrt(_squared_distances(few, few))
    return float(np.median(distances[np.triu_indices(len(few), 1)]))


def kernel_distance(a: Floats, b: Floats) -> Estimate:
    """Return the unbiased squared kernel distance with the cubic kernel (KID), with its interval."""
    return mmd(a, b, cubic_kernel)


def gaussian_distance(a: Floats, b: Floats, bandwidth: float) -> Estimate:
    """Return the unbiased squared kernel distance with a Gaussian kernel (MMD), with its interval."""
    return mmd(a, b, partial(gaussian_kernel, bandwidth=bandwidth))


def mmd(a: Floats, b: Floats, kernel: Kernel) -> Estimate:
    """Return the unbiased estimate of the squared maximum mean discrepancy, which may be below 0, with its interval.

    The interval is of the jackknife: the estimate without each picture of either set, of sums that are there anyway.

    Source: Gretton et al. 2012, JMLR 13, Eq. 3.
    """
    _require(a, b, 3)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, m = len(a), len(b)
    within_a, within_b = _rows(a, a, kernel) - _own(a, kernel), _rows(b, b, kernel) - _own(b, kernel)  # (n,), (m,)
    across_a, across_b = _rows(a, b, kernel), _rows(b, a, kernel)  # (n,), (m,)
    all_a, all_b, across = within_a.sum(), within_b.sum(), across_a.sum()
    mean_a, mean_b = all_a / (n * (n - 1)), all_b / (m * (m - 1))
    value = mean_a + mean_b - 2 * across / (n * m)
    without_a = (all_a - 2 * within_a) / ((n - 1) * (n - 2)) + mean_b - 2 * (across - across_a) / ((n - 1) * m)
    without_b = (all_b - 2 * within_b) / ((m - 1) * (m - 2)) + mean_a - 2 * (across - across_b) / ((m - 1) * n)
    return jackknifed(float(value), [without_a, without_b])


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of generated pictures within the real set's manifold, and of real ones within the generated set's."""

    precision: Estimate
    recall: Estimate


def precision_recall(generated: Floats, real: Floats, nearest: int = NEAREST) -> PrecisionRecall:
    """Return precision and recall, where a set's manifold is balls around its pictures out to a near neighbour.

    Args:
        generated, real: features (n, D) and (m, D); the figures depend on n and m, which should be equal.
        nearest: the neighbour that a ball reaches to, 1 for the nearest.

    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, Eq. 1 and 2.
    """
    _require(generated, real, nearest + 1)
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    return PrecisionRecall(share(_inside(generated, real, nearest)), share(_inside(real, generated, nearest)))


def _inside(points: Floats, centers: Floats, nearest: int) -> NDArray[np.bool_]:
    """Say which points lie in the ball of any center."""
    radii = np.concatenate(
        [np.partition(_squared_distances(part, centers), nearest, axis=1)[:, nearest] for part in _blocks(centers)]
    )
    return np.concatenate([(_squared_distances(part, centers) <= radii).any(axis=1) for part in _blocks(points)])


def _rows(a: Floats, b: Floats, kernel: Kernel) -> Floats:
    """Return the kernel's sums over b for each of a, (n,)."""
    return np.concatenate([kernel(part, b).sum(axis=1) for part in _blocks(a)])


def _own(a: Floats, kernel: Kernel) -> Floats:
    return np.array([kernel(one[None], one[None]).item() for one in a])


def _blocks(rows: Floats) -> Sequence[Floats]:
    return [rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK)]


def _squared_distances(a: Floats, b: Floats) -> Floats:
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    return (squares - 2 * a @ b.T).clip(0)


def _require(a: Floats, b: Floats, least: int) -> None:
    for one in (a, b):
        if one.ndim != 2 or len(one) < least:
            raise InputError(f"a distance needs at least {least} pictures in each set, got {len(one)}; add some")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"features must be of one network, got {a.shape[1]} and {b.shape[1]} values a picture")
