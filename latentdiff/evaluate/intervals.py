"""Estimates with 95 % intervals: means, shares, and statistics of whole sets by the jackknife."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Estimate", "Paired", "grouped_jackknife", "mean", "paired_difference", "share"]

Floats = NDArray[np.float64]

LEVEL = 0.95  # of every interval
GROUPS = 20  # of the jackknife


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; n is how many pictures it is of."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


@dataclass(frozen=True)
class Paired:
    """The difference of two reports on the same items, B less A; `differs` says whether its interval leaves out 0."""

    difference: Estimate

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.difference.low > 0 or self.difference.high < 0


def mean(values: ArrayLike) -> Estimate:
    """Return the mean of independent values with Student's interval; without an interval (NaN) for a single one."""
    found = np.asarray(values, dtype=np.float64).ravel()
    center = float(found.mean()) if len(found) else math.nan
    if len(found) < 2:
        return Estimate(center, math.nan, math.nan, len(found))
    half = _student(len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Estimate(center, center - half, center + half, len(found))


def share(hits: ArrayLike) -> Estimate:
    """Return the share of true values among some, with Wilson's score interval.

    Source: Wilson 1927, Journal of the American Statistical Association 22.
    """
    found = np.asarray(hits, dtype=bool).ravel()
    n = len(found)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value, z = float(found.mean()), _normal()
    center = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if value == 0 else max(0.0, center - half)
    return Estimate(value, low, 1.0 if value == 1 else min(1.0, center + half), n)


def paired_difference(first: ArrayLike, second: ArrayLike) -> Paired:
    """Return the mean of second - first over the items of both, with its interval."""
    return Paired(mean(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)))


def grouped_jackknife(statistic: Callable[..., float], *samples: Floats, groups: int = GROUPS) -> Estimate:
    """Return a statistic of sets with an interval from leaving out each group once, of all sets together.

    Of independent sets the variances add up, as if groups of one set after another had been left out; of sets whose
    items belong together in their order the interval is that of pairs.

    Args:
        statistic: of sets (n, ...), any number of them; smooth in their distributions.
        samples: the sets; their items are independent and in no order.
        groups: of each set, of equal size but one.

    Source: Efron and Stein 1981, Annals of Statistics 9; delete-a-group as in Kott 2001.
    """
    value, parts = statistic(*samples), min(groups, *map(len, samples))
    if parts < 2:
        return Estimate(value, math.nan, math.nan, len(samples[0]))
    owners = [np.arange(len(sample)) % parts for sample in samples]
    found = np.array(
        [statistic(*(sample[owner != group] for sample, owner in zip(samples, owners))) for group in range(parts)]
    )
    variance = (parts - 1) / parts * float(np.square(found - found.mean()).sum())
    half = _student(parts - 1) * math.sqrt(variance)
    return Estimate(value, value - half, value + half, len(samples[0]))


def jackknifed(value: float, left_out: Sequence[Floats]) -> Estimate:
    """Return an estimate with an interval from its values without each item of each of several sets."""
    variance = sum((len(one) - 1) / len(one) * float(np.square(one - one.mean()).sum()) for one in left_out)
    half = _normal() * math.sqrt(variance)
    return Estimate(value, value - half, value + half, len(left_out[0]))


def _student(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))


def _normal() -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + LEVEL) / 2)
