"""Where jobs are kept until their clients have what they came for."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from latentdiff.generation.result import GeneratedImage
from latentdiff.serve.http.desk import Desk, Taken
from latentdiff.serve.http.errors import ApiError, api_error
from latentdiff.serve.http.jobs.orders import Form
from latentdiff.serve.jobs import ENDS, Event, ServedJob

__all__ = ["Kept", "Shelf"]

GONE_SECONDS = 15.0  # without a question or an open stream, after which a client has gone
NOTHING_TO_TELL = "cancelled"  # by the client itself


@dataclass(eq=False)
class Kept:
    """A job that is kept.

    Attributes:
        taken, form: see there; `taken` was handed in.
        job: itself.
        created: when, in seconds since 1970.
        asked: when somebody has asked for it last, on the clock of `time.monotonic`.
        streams: of events that are open.
        fetched: numbers of the pictures that somebody has got.
        told: whether somebody knows how it ended.
        leaving: whether `Shelf.on_end` is at work on it, which may ask for it as a client does.
    """

    taken: Taken
    form: Form
    job: ServedJob
    created: float = field(default_factory=time.time)
    asked: float = field(default_factory=time.monotonic)
    streams: int = 0
    fetched: set[int] = field(default_factory=set)
    told: bool = False
    leaving: bool = False
    _refusal: ApiError | None = None

    @property
    def id(self) -> str:
        """What the job is called."""
        return self.taken.claim.name

    @property
    def status(self) -> str:
        """ "waiting", "running", "done", "failed" or "cancelled"."""
        kind = self.job.status
        return kind if kind in (*ENDS, "waiting") else "running"

    @property
    def refusal(self) -> ApiError | None:
        """Why there are no pictures, once that is so."""
        error = next((event.error for event in self.job.past() if event.error is not None), None)
        if self._refusal is None and error is not None:
            self._refusal = api_error(error)  # once, as it may log
        return self._refusal

    @property
    def untold(self) -> bool:
        """Whether it has ended, and a client that wants it does not have the pictures, or does not know of its end."""
        known = self.form.drop or self.told or self.status == NOTHING_TO_TELL
        return self.job.ended and (self.leaving or (not known and len(self.fetched) < self.job.count))

    @property
    def bytes(self) -> int:
        """What its pictures take."""
        images = [picture.image for picture in self.job.pictures.values()]
        return sum(image.width * image.height * len(image.getbands()) for image in images)


class Shelf:
    """Jobs by their names; all of it is for the thread of the event loop.

    Args:
        desk: took them.

    Attributes:
        on_end: called with a job that has ended; None for nothing.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk, self._limits = desk, desk.limits
        self._kept = OrderedDict[str, Kept]()
        self.on_end: Callable[[Kept], Coroutine[Any, Any, None]] | None = None
        self._ending = set[asyncio.Task[None]]()  # which would else be collected

    @property
    def untold(self) -> bool:
        """Whether a job has ended, and its client has yet to come for it."""
        return any(kept.untold for kept in self._kept.values())

    def add(self, taken: Taken, form: Form, job: ServedJob) -> Kept:
        """Keep a job that was handed in."""
        kept = self._kept[taken.claim.name] = Kept(taken, form, job)
        loop = asyncio.get_running_loop()
        job.listen(lambda event: event.kind in ENDS and loop.call_soon_threadsafe(self._ended, kept))
        if form.drop:
            self._watch(kept)
        return kept

    def has(self, name: str) -> bool:
        """Return whether a job is here."""
        return name in self._kept

    def find(self, name: str) -> Kept:
        """Return a job, which somebody has asked for now.

        Raises:
            ApiError: there is none, or none any more.
        """
        kept = self._kept.get(name)
        if kept is None:
            raise ApiError(404, f"there is no job {name[:80]}, or none any more; hand it in again", "job_not_found")
        kept.asked = time.monotonic()
        return kept

    def picture(self, kept: Kept, index: int) -> GeneratedImage:
        """Return a picture, which somebody gets now.

        Raises:
            ApiError: it is not drawn, or there will be none.
        """
        found = kept.job.pictures.get(index)
        if found is None:
            raise ApiError(404, f"picture {index} is not drawn; the job says how far it is", "not_drawn")
        kept.fetched.add(index)
        return found

    async def events(self, kept: Kept, after: int) -> AsyncIterator[Event]:
        """Yield what happens to a job, from the event after that of a number on."""
        kept.streams += 1
        try:
            async for event in kept.job.stream(after):
                yield event
                if event.picture is not None and event.index is not None:
                    kept.fetched.add(event.index)
                kept.told |= event.kind in ENDS
        finally:
            kept.streams -= 1
            kept.asked = time.monotonic()

    def remove(self, kept: Kept) -> None:
        """Cancel a job that has not ended; forget one that has."""
        if kept.job.ended:
            self._kept.pop(kept.id, None)
        else:
            kept.taken.cancel()

    def _watch(self, kept: Kept) -> None:
        """Cancel a job when its client has gone."""
        rest = kept.asked + GONE_SECONDS - time.monotonic()
        if kept.job.ended:
            return
        if rest <= 0 and not kept.streams:
            kept.taken.cancel()
            return
        asyncio.get_running_loop().call_later(max(rest, GONE_SECONDS / 10), self._watch, kept)

    def _ended(self, kept: Kept) -> None:
        """Have a job forgotten after some time, and the oldest now where there are too many."""
        if self.on_end is not None:
            kept.leaving = True
            task = asyncio.get_running_loop().create_task(self.on_end(kept))
            self._ending.add(task)
            task.add_done_callback(lambda task: self._left(task, kept))
        asyncio.get_running_loop().call_later(self._limits.job_seconds, self._kept.pop, kept.id, None)
        ended = [one for one in self._kept.values() if one.job.ended]
        size = sum(one.bytes for one in ended)
        for one in ended[:-1]:
            if size <= self._limits.job_bytes and len(ended) <= self._limits.kept_jobs:
                return
            size -= one.bytes
            ended = ended[1:]
            self._kept.pop(one.id)

    def _left(self, task: asyncio.Task[None], kept: Kept) -> None:
        kept.leaving = False
        self._ending.discard(task)
