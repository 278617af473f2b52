"""Prefetch batches. They are pure functions of (seed, step), so workers change speed, never results."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from latentdiff.errors import LatentDiffError

from .budget import Budget, share

AHEAD = 4

Result = TypeVar("Result")


def workers() -> int:
    """Return how many help with pictures: one for each core that this process may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def prefetched(draw: Callable[[int], Result], numbers: range, threads: int | None = None) -> Iterator[Result]:
    """Yield draw(number) for all numbers in their order, computed ahead in threads (Pillow and torch let them run).

    For work in bulk; a loop that does something else meanwhile is held up less by `prefetched_by_workers`.

    Args:
        draw: may be called from several threads at once.
        threads: `workers()` when None; up to `AHEAD` results for each are held, so that a hiccup is not felt.
    """
    count = threads or workers()
    pool = ThreadPoolExecutor(count, thread_name_prefix="prefetch")
    waiting: deque[Future[Result]] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(draw, number))
            if len(waiting) >= AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prefetched_by_workers(draw: Callable[[int], Result], numbers: range, processes: int) -> Iterator[Result]:
    """Yield draw(number) for all numbers in their order, computed ahead in other processes, or here without any.

    The processes start when the first result is asked for.

    Args:
        draw: can be pickled; returns what can be pickled, without tensors (their shared memory is small in containers).
        processes: none or more; up to `AHEAD` results for each are held.
    """
    if not processes:
        yield from map(draw, numbers)
        return
    loader = DataLoader(
        _Draws(draw, numbers),
        batch_size=None,
        num_workers=processes,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_start, Budget(multiprocessing)),
        generator=torch.Generator(),  # else the global one is moved on
    )
    with warnings.catch_warnings():  # of a fork beside threads; the workers use nothing that one of those may hold
        warnings.simplefilter("ignore", DeprecationWarning)
        results = iter(loader)
    for result in prefetched(lambda _: next(results), numbers, threads=1):  # fetching takes a while on a busy machine
        if isinstance(result, LatentDiffError):
            raise result
        yield result


@dataclass(frozen=True)
class _Draws(Dataset, Generic[Result]):
    """What is drawn, as a data set."""

    draw: Callable[[int], Result]
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Result | LatentDiffError:
        """Return a result, or an error meant for people as a value: a loader would wrap it in a traceback."""
        try:
            return self.draw(self.numbers[index])
        except LatentDiffError as error:
            return error


def _start(budget: Budget, worker: int) -> None:
    """Begin a process that helps: its pictures count with those of the others."""
    share(budget)


def _as_it_is(result: object) -> Any:
    return result
