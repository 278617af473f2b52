"""Work ahead: the same results in the same order, whatever the number of threads or processes."""

import threading
import time

import pytest
import torch
from latentdiff.training.data.prefetch import AHEAD, prefetched, prefetched_by_workers, workers

from latentdiff.errors import InputError


@pytest.mark.parametrize("threads", [None, 1, 2, 7])
def test_order_does_not_depend_on_threads(threads: int | None) -> None:
    def draw(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(prefetched(draw, range(3, 40), threads)) == [number * number for number in range(3, 40)]


def test_no_more_is_drawn_than_is_held_and_nothing_goes_on_after_the_end() -> None:
    drawn: list[int] = []
    batches = prefetched(lambda number: drawn.append(number) or number, range(1000), 2)
    assert next(batches) == 0
    batches.close()
    assert len(drawn) <= 2 * AHEAD
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_an_error_comes_where_it_belongs() -> None:
    batches = prefetched(lambda number: 1 // (3 - number), range(6), 2)
    assert [next(batches) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


def square(number: int) -> int:
    if number == 30:
        raise InputError("thirty is refused")
    return number * number


@pytest.mark.parametrize("processes", sorted({0, 1, workers()}))
def test_order_does_not_depend_on_processes(processes: int) -> None:
    state = torch.get_rng_state()
    assert list(prefetched_by_workers(square, range(3, 20), processes)) == [number * number for number in range(3, 20)]
    assert torch.equal(torch.get_rng_state(), state)
    results = prefetched_by_workers(square, range(29, 40), processes)
    assert next(results) == 841
    with pytest.raises(InputError, match=r"^thirty is refused$"):
        next(results)
