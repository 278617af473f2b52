"""The queue: which image is drawn next."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from latentdiff.errors import ClosedError, QueueFullError
from latentdiff.serve.jobs import ServedJob

__all__ = ["Turn", "Waiting"]

MOST_CLIENTS = 10_000  # whose last turn is remembered


@dataclass(frozen=True)
class Turn:
    """An image whose turn it is."""

    job: ServedJob
    index: int


class Waiting:
    """Jobs with images that are not drawn yet, at most `limit` of them.

    Of the jobs of the highest priority that client's turn is next who had one longest ago, image by image; of the jobs
    of a client that of the nearest deadline, and else the first that came.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.closed = False
        self._lock = threading.RLock()
        self._jobs = list[ServedJob]()
        self._turns, self._served = 0, OrderedDict[str, int]()  # client -> number of its last turn

    def __len__(self) -> int:
        with self._lock:
            self._forget_ended()
            return len(self._jobs)

    def require_room(self) -> None:
        """Raise QueueFullError where no other job may wait, ClosedError where none may ever again."""
        with self._lock:
            if self.closed:
                raise ClosedError("the scheduler is closed and takes no more jobs; make a new one")
            if len(self) >= self.limit:
                raise QueueFullError(f"{self.limit} jobs wait already, which is the most that may; try again later")

    def put(self, job: ServedJob) -> None:
        """Let a job wait; see `require_room`."""
        with self._lock:
            self.require_room()
            self._jobs.append(job)

    def unprepared(self) -> ServedJob | None:
        """Return the job to prepare next, or None."""
        with self._lock:
            return self._next(lambda job: job.drawing is None)

    def take(self, fits: Callable[[ServedJob], bool]) -> Turn | None:
        """Return the image whose turn it is among the prepared jobs, and take it out; None if it does not fit now.

        Smaller ones do not overtake one that does not fit, which might else wait for ever.
        """
        with self._lock:
            job = self._next(lambda job: job.drawing is not None)
            if job is None or not fits(job):
                return None
            turn = Turn(job, job.next_index)
            job.next_index += 1
            if job.next_index == job.count:
                self._jobs.remove(job)
            self._turns += 1
            self._served[job.client] = self._turns
            self._served.move_to_end(job.client)
            if len(self._served) > MOST_CLIENTS:
                self._served.popitem(last=False)
            return turn

    def expire(self, now: float) -> None:
        """End the jobs whose deadline has passed."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.expire(now)

    def nearest_deadline(self) -> float | None:
        """Return the first deadline of the jobs that wait, or None."""
        with self._lock:
            self._forget_ended()
            return min((job.deadline for job in self._jobs if job.deadline is not None), default=None)

    def close(self) -> list[ServedJob]:
        """Take no more jobs; return those that wait."""
        with self._lock:
            self.closed = True
            return list(self._jobs)

    def _next(self, which: Callable[[ServedJob], bool]) -> ServedJob | None:
        self._forget_ended()
        return min((job for job in self._jobs if which(job)), key=self._order, default=None)

    def _order(self, job: ServedJob) -> tuple[float, ...]:
        served, deadline = self._served.get(job.client, 0), math.inf if job.deadline is None else job.deadline
        return (-job.priority, served, deadline, job.submitted)

    def _forget_ended(self) -> None:
        self._jobs = [job for job in self._jobs if not job.ended]
