"""Intervals contain the truth as often as they say."""

from __future__ import annotations

import numpy as np

from latentdiff.evaluate.distances import kernel_distance
from latentdiff.evaluate.intervals import Estimate, grouped_jackknife, mean, paired_difference, share

RUNS = 1000


def covered(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in estimates]))


def test_intervals_of_means_shares_and_paired_differences() -> None:
    rng = np.random.default_rng(0)
    assert 0.93 <= covered([mean(rng.exponential(2.0, 100)) for _ in range(RUNS)], 2.0) <= 0.97
    assert 0.93 <= covered([share(rng.random(100) < 0.8) for _ in range(RUNS)], 0.8) <= 0.97
    pairs = [(x := rng.normal(size=60), x + rng.normal(0.3, 0.2, 60)) for _ in range(RUNS)]
    assert 0.93 <= covered([paired_difference(a, b).difference for a, b in pairs], 0.3) <= 0.97
    assert paired_difference(*pairs[0]).differs and not paired_difference([1, 2, 3], [1, 2, 3.1]).differs


def test_intervals_of_statistics_of_sets() -> None:
    """The jackknife: of a smooth statistic by groups, and of the kernel distance picture by picture."""
    rng = np.random.default_rng(1)
    spread = [grouped_jackknife(lambda x: float(np.std(x)), rng.normal(size=200)) for _ in range(RUNS)]
    assert 0.93 <= covered(spread, 1.0) <= 0.97
    sets = [(rng.exponential(2.0, 100), rng.normal(1.0, 3.0, 240)) for _ in range(RUNS)]  # left out of both at once
    assert 0.93 <= covered([grouped_jackknife(mean_difference, *pair, groups=10) for pair in sets], 1.0) <= 0.97
    found = [kernel_distance(rng.normal(0, 1, (80, 3)), rng.normal(0.5, 1, (80, 3))) for _ in range(RUNS)]
    assert 0.93 <= covered(found, cubic_truth(0.5, 3)) <= 0.97


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.mean() - b.mean())


def cubic_truth(shift: float, size: int) -> float:
    """The squared kernel distance of N(0, I) and N(shift, I) under (x . y / D + 1)^3.

    With t = x . y for x of N(m, I) and y of N(n, I): E t = m.n, E t^2 = D + m.m + n.n + (m.n)^2,
    E t^3 = (m.n)^3 + 3 m.n (D + 2 + m.m + n.n).
    """

    def mean_of(m: float, n: float) -> float:
        product, squares = size * m * n, size * (m * m + n * n)
        second = size + squares + product**2
        third = product**3 + 3 * product * (size + 2 + squares)
        return third / size**3 + 3 * second / size**2 + 3 * product / size + 1

    return mean_of(0, 0) + mean_of(shift, shift) - 2 * mean_of(0, shift)


def test_single_values_and_empty_sets_have_no_interval() -> None:
    assert np.isnan(mean([1.0]).low) and mean([1.0]).value == 1
    assert share([True] * 5).high == 1 and 0.5 < share([True] * 5).low < 0.6
    assert share([]).n == 0 and np.isnan(share([]).value)
