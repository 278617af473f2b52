"""Batch order: every sample once an epoch, whatever the batch size, the groups and what was skipped."""

from collections import Counter

import numpy as np
import pytest
from latentdiff.training.data.batch_order import BatchOrder


def seen(order: BatchOrder, batch_size: int, steps: int, seed: int = 1) -> list[int]:
    return [int(i) for step in range(steps) for i in order.batch(step, batch_size, seed)[0]]


def test_every_epoch_sees_every_sample_once_whatever_the_batch_size() -> None:
    sequence = seen(BatchOrder.of(7), 3, 14)
    assert all(sorted(sequence[start : start + 7]) == list(range(7)) for start in range(0, 42, 7))
    assert sequence == seen(BatchOrder.of(7), 7, 6)
    assert sequence[:7] != seen(BatchOrder.of(7), 7, 1, seed=2)
    assert BatchOrder.of(7).batch(2, 3, 1)[1].tolist() == [0, 1, 1]


def test_skipping_does_not_change_the_order_of_the_rest() -> None:
    whole, places = seen(BatchOrder.of(20), 4, 5), np.delete(np.arange(20), [3, 11])
    rest = BatchOrder(places, np.zeros(18, dtype=np.int64), 20)
    assert [int(places[i]) for i in seen(rest, 6, 3)] == [place for place in whole if place in places]


@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("sizes", [(1, 5, 30), (12, 12), (2, 3)])
def test_groups_never_mix_and_every_sample_is_seen_alike(sizes: tuple[int, ...], batch_size: int) -> None:
    total, epochs = sum(sizes), 21
    order = BatchOrder(np.arange(total), np.repeat(np.arange(len(sizes)), sizes), total)
    steps = sum(size * epochs // batch_size for size in sizes)
    drawn: list[tuple[int, int]] = []
    for step in range(steps):
        indices, sample_epochs = order.batch(step, batch_size, seed=5)
        assert len(set(order.groups[indices])) == 1
        drawn += zip(indices.tolist(), sample_epochs.tolist())
    assert len(set(drawn)) == len(drawn)
    counts = Counter(index for index, _ in drawn)
    for group, size in enumerate(sizes):
        carried = -(-(size * epochs % batch_size) // size)  # of a group, what has not filled a batch yet
        assert all(epochs - carried <= counts[i] <= epochs for i in np.flatnonzero(order.groups == group))


def test_repeated_samples_come_so_often_an_epoch_and_each_time_is_another() -> None:
    places, repeats = np.array([0, 1, 3, 4, 5]), np.array([1, 3, 2, 1, 1])
    order = BatchOrder(places, np.array([0, 0, 0, 1, 1]), 6, repeats)
    drawn = [pair for step in range(40) for pair in zip(*(part.tolist() for part in order.batch(step, 2, 0)))]
    assert len(set(drawn)) == len(drawn) == 80
    assert Counter(sample for sample, _ in drawn) == {0: 10, 1: 30, 2: 20, 3: 10, 4: 10}
    without = BatchOrder(places, order.groups, 6, np.ones(5, dtype=np.int64))
    plain = BatchOrder(places, order.groups, 6)
    assert [seen(one, 2, 25) for one in (without,)] == [seen(plain, 2, 25)]
    fewer = BatchOrder(places[1:], order.groups[1:], 6, repeats[1:])  # the first row is broken now
    one, other = (seen(BatchOrder(of.places, of.groups * 0, 6, of.repeats), 1, 40) for of in (order, fewer))
    assert [places[n] for n in one if n] == [places[1:][n] for n in other][: len([n for n in one if n])]


def test_batches_of_groups_are_shuffled_and_any_of_them_can_be_asked_for() -> None:
    order = BatchOrder(np.arange(40), np.repeat([0, 1], 20), 40)
    batches = [order.batch(step, 4, 0)[0].tolist() for step in range(20)]
    again = BatchOrder(order.places, order.groups, 40)
    assert [again.batch(step, 4, 0)[0].tolist() for step in reversed(range(20))] == batches[::-1]
    groups = [int(order.groups[batch[0]]) for batch in batches]
    assert groups[:10] != sorted(groups[:10])
    assert groups[:10] != groups[10:]


def test_no_more_orders_are_held_than_a_batch_needs() -> None:
    """However many epochs have gone by: of each group, this epoch's and the next."""
    order = BatchOrder(np.arange(40), np.repeat([0, 1], 20), 40)
    for step in range(300):
        order.batch(step, 4, 0)
    assert len(order._sequences) <= 4
