"""Shards in hand: which of them take so much longer than others did that a second worker is to draw them too.

A worker may be slow, or hang, without being dead. When nothing else is left to draw, what it has in hand is given to
another; whichever is first counts. That is harmless, as a shard's name says what is in it.

Source: Dean, Ghemawat 2004, "MapReduce", section 3.6 (backup tasks).
"""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["InHand"]

FACTOR = 3.0  # times what shards took of late, for as many rows
LEAST_SECONDS = 10.0  # below which nothing is late, as a second worker has to begin at the start
REMEMBERED = 101  # shards that say what is usual
MOST_WORKERS = 2  # at one shard


class InHand:
    """The shards that workers have in hand; times are seconds of any clock that only goes forward."""

    def __init__(self) -> None:
        self._begun = dict[int, tuple[float, int]]()  # when, and how many rows
        self._workers = dict[int, int]()
        self._usual = deque[float](maxlen=REMEMBERED)  # seconds a row

    def __contains__(self, number: int) -> bool:
        return number in self._begun

    def __len__(self) -> int:
        return len(self._begun)

    def begin(self, number: int, rows: int, now: float) -> None:
        """Note that a worker takes a shard, the first one or another beside it."""
        self._begun.setdefault(number, (now, rows))
        self._workers[number] = self._workers.get(number, 0) + 1

    def end(self, number: int, now: float) -> None:
        """Note that a shard is written."""
        begun, rows = self._begun.pop(number)
        self._usual.append((now - begun) / max(1, rows))
        del self._workers[number]

    def lose(self, number: int) -> bool:
        """Note that a worker died of it, or with it; return whether nobody has the shard in hand any more."""
        self._workers[number] -= 1
        if self._workers[number]:
            return False
        del self._begun[number], self._workers[number]
        return True

    def late(self, now: float) -> int | None:
        """Return the number of the shard that another worker should begin; None where none is late."""
        if not self._usual:
            return None
        usual, found = statistics.median(self._usual), list[tuple[float, int]]()
        for number, (begun, rows) in self._begun.items():
            over = now - begun - max(LEAST_SECONDS, FACTOR * usual * max(1, rows))
            if over >= 0 and self._workers[number] < MOST_WORKERS:
                found.append((over, number))
        return max(found)[1] if found else None
