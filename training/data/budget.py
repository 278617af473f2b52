"""Limit the bytes of decoded pictures held at once by all threads or processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

UNIT = 2**25
UNITS = 48  # 1.5 GiB: one picture of the largest size that is opened, or eight photographs of 12 megapixels
BYTES_PER_PIXEL = 20  # of the copies that are made until a picture is upright and has its colours and opacity


class Budget:
    """A number of bytes that those who need some wait for; who needs more than there are gets all.

    Args:
        context: `threading`, or `multiprocessing` for a budget that processes share.
    """

    def __init__(self, context: ModuleType = threading) -> None:
        self.free, self.turn = context.Semaphore(UNITS), context.Lock()

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Hold `size` bytes; nobody may hold some already and ask for more."""
        count = min(UNITS, -(-size // UNIT))
        with self.turn:  # one after the other, so that two do not wait for each other, each with half of what it needs
            for _ in range(count):
                self.free.acquire()
        try:
            yield
        finally:
            for _ in range(count):
                self.free.release()


_budget = Budget()


def share(budget: Budget) -> None:
    """Draw on a budget that other processes draw on too, from now on."""
    global _budget
    _budget = budget


@contextmanager
def room_for(size: tuple[int, int]) -> Iterator[None]:
    """Hold what a picture of a width and height takes while it is decoded."""
    with _budget.held(BYTES_PER_PIXEL * size[0] * size[1]):
        yield
