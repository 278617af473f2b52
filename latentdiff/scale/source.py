"""The shards of a job that a cluster draws, given out one by one to whoever asks for one.

A worker asks for the shard at a place, or, at the end of a job, for any that is left: one that nobody has begun, as it
waits behind a worker that hangs, or one that is late (see `stragglers`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from latentdiff.errors import LatentDiffError
from latentdiff.scale.commit import Report
from latentdiff.scale.plan import Task
from latentdiff.scale.stragglers import InHand
from latentdiff.scale.worker import Deaths, Rows

__all__ = ["END", "SKIP", "WAIT", "Failed", "Source"]

SKIP = "skip"  # another worker has that shard in hand, or has written it
WAIT = "wait"  # nothing is left but what others have in hand
END = "end"  # all shards are written


@dataclass(frozen=True)
class Failed:
    """The error that ends a job: the name of its class, and its message."""

    error: str
    message: str


class Source:
    """Gives out the tasks of a job by their place in it; one actor, beside the driver.

    Args:
        tasks: gives all of them from the first on, each time it is called.
        folder: of the driver, which paths are relative to.
        count: how many tasks there are.
        written: gives the names of the shards that are there; asked once, when it is time for what is left, as this
            actor may have been lost and begun anew.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        tasks: Callable[[], Iterator[Task]],
        folder: str,
        count: int,
        written: Callable[[], set[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        os.chdir(folder)
        self._make, self._deaths, self._count, self._list, self._clock = tasks, Deaths(), count, written, clock
        self._reading, self._next, self._furthest = tasks(), 0, -1
        self._held = dict[int, Task]()  # given out or passed by, and not done
        self._in_hand = InHand()
        self._mine = dict[int, int]()  # who asks, by a place -> the task in hand
        self._began = dict[int, Rows]()  # who asks -> the batch
        self._done = dict[int, Report | None]()  # None of what was there before this actor
        self._doubled = dict[int, str]()
        self._written: set[str] | None = None

    def get(self, place: int) -> Task | str | Failed:
        """Return the task at a place, or any that is left from place `count` on; or else what there is to do.

        Who asks for one place again has lost the worker that had its task.
        """
        try:
            if place in self._mine:
                return self._again(place)
            if place >= self._count:
                return self._left(place)
            taken = place in self._done or place in self._in_hand
            return SKIP if taken else self._given(place, place)
        except LatentDiffError as error:
            return Failed(type(error).__name__, str(error))

    def began(self, place: int, rows: Rows) -> None:
        """Note which batch is being drawn of the task that was given for a place."""
        self._began[place] = rows

    def done(self, place: int, report: Report) -> None:
        """Let go of the task that was given for a place."""
        number = self._mine.get(place)
        if number is None:  # another was first, or this actor is not the one that gave it
            if place < self._count:
                self._done.setdefault(place, report)
            return
        self._in_hand.end(number, self._clock())
        self._done[number] = report
        owners = [one for one, own in self._mine.items() if own == number] if number in self._doubled else [place]
        for owner in owners:
            del self._mine[owner]
            self._began.pop(owner, None)
        del self._held[number]

    def reports(self) -> list[Report]:
        """Return what became of the tasks that are done."""
        return [report for report in self._done.values() if report is not None]

    def doubled(self) -> list[str]:
        """Return the names of shards that two workers had in hand at once."""
        return list(self._doubled.values())

    def _again(self, place: int) -> Task:
        number = self._mine[place]
        if place in self._began:
            self._held[number] = self._deaths.note(self._held[number], self._began.pop(place), "see Ray's log")
        return self._held[number]

    def _given(self, number: int, place: int) -> Task:
        task = self._held[number] if number in self._held else self._read(number)
        self._held[number], self._mine[place] = task, number
        if number in self._in_hand:
            self._doubled[number] = task.shard.name
        self._in_hand.begin(number, task.lacking, self._clock())
        return task

    def _left(self, place: int) -> Task | str:
        number = self._unbegun()
        if number is None:
            number = self._in_hand.late(self._clock())
        if number is not None:
            return self._given(number, place)
        return END if len(self._done) == self._count else WAIT

    def _unbegun(self) -> int | None:
        """Return a task that nobody has in hand or has written."""
        if self._written is None:
            self._written = self._list()
        for number in [one for one in self._held if one not in self._in_hand]:
            if self._is_there(self._held[number]):
                self._done[number] = None
                del self._held[number]
            else:
                return number
        while (number := self._furthest + 1) < self._count:
            task = self._read(number)
            if number not in self._done and not self._is_there(task):
                self._held[number] = task
                return number
            self._done.setdefault(number, None)
        return None

    def _is_there(self, task: Task) -> bool:
        return not task.again and self._written is not None and task.shard.name in self._written

    def _read(self, number: int) -> Task:
        if number < self._next:
            self._reading, self._next = self._make(), 0
        while True:
            task, at = next(self._reading), self._next
            self._next += 1
            if at > self._furthest:
                self._furthest = at
                if at < number:
                    self._held[at] = task
            if at == number:
                return task
