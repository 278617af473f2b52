"""Processes on this machine: each has the model, takes a shard, writes it, and takes the next one.

A process that dies costs the shard that it had in hand; another is started in its place and draws that again. One that
has nothing left to do waits for what others have in hand, and draws a shard that is late beside its first worker, which
is ended when it is the last of the two (see `stragglers`).
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from latentdiff.devices import gpu_of_process
from latentdiff.errors import StorageError
from latentdiff.scale.commit import Report, find_damage
from latentdiff.scale.plan import Task
from latentdiff.scale.stragglers import InHand
from latentdiff.scale.worker import Crew, Deaths, Rows, work

__all__ = ["Began", "draw_here", "draw_locally"]

MOST_FALSE_STARTS = 3  # of processes in turn that die while they load the model
PAUSE = 1.0  # seconds between two looks at what is late
GRACE = 5.0  # seconds in which a process that is told to end should


@dataclass(frozen=True)
class Began:
    """A worker has drawn so many rows of a shard and goes on with the next."""

    shard: int
    rows: int


Events = Iterator[Report | Began]


def draw_here(tasks: Iterator[Task], crew: Crew) -> Events:
    """Draw in this process and yield what happens.

    Raises:
        InputError, ModelLoadError: the model cannot be loaded.
        StorageError: the store fails.
    """
    artist = crew.artist()
    for task in tasks:
        yield crew.write(task, artist)


def draw_locally(tasks: Iterator[Task], crew: Crew, workers: int) -> Events:
    """Draw in processes of this machine and yield what happens.

    Args:
        tasks: taken one by one, as they are needed.
        crew: what the processes share.
        workers: how many of them, at least 1.

    Raises:
        InputError, ModelLoadError: the model cannot be loaded.
        StorageError: the store fails, or processes die before they draw anything.
    """
    team = _Team(tasks, crew)
    try:
        for place in range(workers):
            team.start(place)
        while team.members:
            for connection in wait([member.connection for member in team.members.values()], team.patience):
                member = next((one for one in team.members.values() if one.connection is connection), None)
                if member is not None:  # and not ended by what was heard of another
                    yield from team.heard(member)
            team.give_to_idle()
    finally:
        team.end()


@dataclass
class _Member:
    """A process that draws."""

    place: int
    process: BaseProcess
    connection: Connection
    task: Task | None = None  # None where it waits for one
    ready: bool = False
    rows: Rows = ()  # of the batch in hand
    drawn: int = 0  # rows of the shard before that batch


class _Team:
    """The processes of a job."""

    def __init__(self, tasks: Iterator[Task], crew: Crew) -> None:
        self.tasks, self.crew = tasks, crew
        self.members = dict[int, _Member]()
        self._returned = list[Task]()  # by processes that died
        self._in_hand = InHand()
        self._deaths = Deaths()
        self._false_starts = 0
        self._context = multiprocessing.get_context("spawn")

    @property
    def patience(self) -> float | None:
        """Seconds until somebody looks whether a shard is late; None where nobody could take it."""
        return None if all(member.task is not None for member in self.members.values()) else PAUSE

    def give_to_idle(self) -> None:
        """Give what is left to processes that wait, and end them when there can be nothing more for them."""
        for member in [one for one in self.members.values() if one.task is None]:
            member.task = self._next() or self._late()
            if member.task is not None:
                self._send(member)
            elif not self._in_hand:
                self._send(member)
                member.process.join()
                self._forget(member)

    def start(self, place: int) -> None:
        """Start a process, unless there is nothing to do."""
        task = self._next()
        if task is None:
            return
        ours, theirs = self._context.Pipe()
        device = self.crew.model.device
        if device in (None, "auto", "cuda"):
            device = gpu_of_process(place) or device
        crew = replace(self.crew, model=replace(self.crew.model, device=device))
        process = self._context.Process(
            target=work, args=(theirs, crew), name=f"latentdiff-worker-{place}", daemon=True
        )
        process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self.members[place] = _Member(place, process, ours, task)

    def heard(self, member: _Member) -> Events:
        """Take a message of a process, or that it died."""
        try:
            kind, content = member.connection.recv()
        except (EOFError, OSError):
            self._died(member)
            return
        if kind == "error":
            raise content
        if kind == "began":
            assert member.task is not None
            member.drawn, member.rows = member.drawn + len(member.rows), content
            yield Began(member.task.shard.number, member.drawn)
            return
        if kind == "ready":
            member.ready, self._false_starts = True, 0
            self._send(member)
            return
        assert member.task is not None
        if self._is_whole(member, member.task):
            yield content
        member.task = self._next()
        if member.task is not None:
            self._send(member)

    def _send(self, member: _Member) -> None:
        member.drawn, member.rows = 0, ()
        with suppress(OSError):  # of one that has died; the next message says so
            member.connection.send(member.task)

    def _next(self) -> Task | None:
        task = self._returned.pop() if self._returned else next(self.tasks, None)
        if task is not None:
            self._in_hand.begin(task.shard.number, task.lacking, time.monotonic())
        return task

    def _late(self) -> Task | None:
        """Return a shard that another process should have written by now."""
        number = self._in_hand.late(time.monotonic())
        if number is None:
            return None
        self._in_hand.begin(number, 0, time.monotonic())
        return next(one.task for one in self.members.values() if one.task and one.task.shard.number == number)

    def _is_whole(self, member: _Member, task: Task) -> bool:
        """Note that a shard is written, and end the other process that has it in hand, as it may hang.

        Returns:
            Whether it is as it was written; the other may have replaced it, with other bits where its batch is smaller.
        """
        number = task.shard.number
        self._in_hand.end(number, time.monotonic())
        others = [one for one in self.members.values() if one.task is not None and one.task.shard.number == number]
        for other in others:
            if other is not member:
                other.process.kill()
                other.process.join()
                self._forget(other)
        whole = len(others) == 1 or find_damage(self.crew.store, task.shard.name) is None
        if not whole:
            self._returned.append(replace(task, again=True))
        return whole

    def _died(self, member: _Member) -> None:
        member.process.join()
        code, task = member.process.exitcode or 0, member.task
        self._forget(member)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not member.ready:
            self._false_starts += 1
            if self._false_starts >= MOST_FALSE_STARTS:
                raise StorageError(
                    f"{MOST_FALSE_STARTS} workers died while they loaded the model ({how}); try fewer --workers, which "
                    "need less memory"
                )
        if task is not None:
            task = self._deaths.note(task, member.rows, how)
            if self._in_hand.lose(task.shard.number):
                self._returned.append(task)
        self.start(member.place)

    def _forget(self, member: _Member) -> None:
        del self.members[member.place]
        member.connection.close()
        member.process.close()

    def end(self) -> None:
        """End all processes at once; what they have in hand does not count."""
        for member in self.members.values():
            member.process.terminate()
        for member in self.members.values():
            member.process.join(GRACE)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.connection.close()
        self.members.clear()
