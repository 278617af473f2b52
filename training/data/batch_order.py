"""Order samples into batches: a pure function of seed and step, whoever asks and in whatever order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """The samples that batches are drawn from.

    Attributes:
        places: (N,) int64, ascending: the row of each sample among all rows, those that were skipped included, so that
            skipping one does not move the others.
        groups: (N,) int64, 0 to G-1: samples of different groups never share a batch.
        total: how many rows there are.
        repeats: (N,) int64, 1 and above: how often each sample comes in an epoch; None for once each.
    """

    places: np.ndarray
    groups: np.ndarray
    total: int
    repeats: np.ndarray | None = None
    # The newest sequences, by (seed, epoch, group): of each group as many as a batch may need.
    _sequences: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def of(count: int) -> BatchOrder:
        """Return the order of `count` samples of one group."""
        return BatchOrder(np.arange(count), np.zeros(count, dtype=np.int64), count)

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of the batch of `step` and a number that tells the times apart that each is seen.

        Every group is an endless sequence, one permutation of its samples after the other, cut into batches: each
        sample comes once an epoch, or `repeats` times, and what is left of a group at the end of an epoch starts its
        first batch of the next. The batches of all groups that end in one epoch are shuffled.

        Returns:
            Both (batch_size,) int64; without repeats the number is that of the epoch.
        """
        sizes = np.bincount(self.groups, self.repeats).astype(np.int64)
        if len(sizes) == 1:
            group, number = 0, step
        else:
            group, number = _place_of_batch(sizes, step, batch_size, seed)
        positions = number * batch_size + np.arange(batch_size)
        epochs = positions // sizes[group]
        within = positions % sizes[group]
        drawn = [self._sequence(seed, int(epoch), group)[place] for epoch, place in zip(epochs, within)]
        copies, chosen = np.divmod(np.array(drawn, dtype=np.int64), len(self.places))
        return chosen, epochs * self._most + copies

    @property
    def _most(self) -> int:
        return 1 if self.repeats is None else int(self.repeats.max())

    def _sequence(self, seed: int, epoch: int, group: int) -> np.ndarray:
        """Return the samples of a group in their order in an epoch, N more for each time that one has come before."""
        key = (seed, epoch, group)
        found = self._sequences.get(key)
        if found is None:
            sample = np.full(self.total, -1)
            sample[self.places] = np.where(self.groups == group, np.arange(len(self.places)), -1)
            copies, rows = np.divmod(
                np.random.default_rng([seed, epoch]).permutation(self.total * self._most), self.total
            )
            drawn = sample[rows]
            there = drawn >= 0 if self.repeats is None else (drawn >= 0) & (copies < self.repeats[drawn])
            self._sequences[key] = found = (drawn + copies * len(self.places))[there]
            for old in [*self._sequences][: -2 * (int(self.groups.max()) + 1)]:
                self._sequences.pop(old, None)
        return found


def _place_of_batch(sizes: np.ndarray, step: int, batch_size: int, seed: int) -> tuple[int, int]:
    """Return the group of the batch of `step`, and its number among the batches of that group."""
    low, high = 0, (step + 1) * batch_size // int(sizes.min()) + 1  # epochs; the last is after the batch
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _ended(sizes, middle, batch_size).sum() <= step else (low, middle - 1)
    first, last = _ended(sizes, low, batch_size), _ended(sizes, low + 1, batch_size)
    counts = last - first
    ends = np.cumsum(counts)
    drawn = int(np.random.default_rng([seed, low, 1]).permutation(ends[-1])[step - first.sum()])
    group = int(np.searchsorted(ends, drawn, side="right"))
    return group, int(first[group] + drawn - (ends[group] - counts[group]))


def _ended(sizes: np.ndarray, epoch: int, batch_size: int) -> np.ndarray:
    """Return how many batches of each group end before `epoch` begins."""
    return sizes * epoch // batch_size
