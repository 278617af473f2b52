"""A thread for small work beside the loop: preparing jobs, and decoding what is drawn."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable

import torch

__all__ = ["DECODE", "PREPARE", "Helper"]

DECODE, PREPARE, STOP = 0, 1, 2  # in the order of their urgency


class Helper:
    """A thread that runs functions, the most urgent first, and those of one urgency as they came.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._tasks = queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]]()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, urgency: int, task: Callable[[], None]) -> None:
        """Have a function run, which must raise nothing."""
        self._tasks.put((urgency, next(self._numbers), task))

    def close(self) -> None:
        """Run what there is, then end the thread; return when it has."""
        self._tasks.put((STOP, next(self._numbers), None))
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            _, _, task = self._tasks.get()
            if task is None:
                return
            task()
            del task  # and what it holds, before the next one comes
