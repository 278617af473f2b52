"""A job: a request that was handed in, what has happened to it, and its pictures when they are drawn."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from latentdiff.errors import DeadlineError, JobCancelledError
from latentdiff.generation.inputs import hires_size
from latentdiff.generation.result import GeneratedImage, Result
from latentdiff.generation.run import Drawing
from latentdiff.generation.stages import Job

__all__ = ["ENDS", "Event", "ServedJob"]

ENDS = ("done", "failed", "cancelled")  # kinds of the last event of a job


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        kind: "admitted", "step", "preview" or "picture", of one image; "done", "failed" or "cancelled", of the job.
        index: number of the image; None where it is about the job.
        step, steps: how many steps of the image are done, and how many it takes.
        preview: small picture of what the image will be.
        picture: the image.
        error: why the job failed.
        number: of the event in its job, from 1; of several previews of an image only the newest is kept.
    """

    kind: str
    index: int | None = None
    step: int = 0
    steps: int = 0
    preview: Image.Image | None = None
    picture: GeneratedImage | None = None
    error: Exception | None = None
    number: int = field(default=0, compare=False)


class ServedJob:
    """A job of a scheduler; `Scheduler.submit` makes it. All of it may be called from any thread.

    Args:
        request: with model and inputs.
        output_type: see `Pipeline.__call__`.
        client: whose turn it is, when it is drawn.
        priority: jobs of a higher one are drawn first.
        deadline: seconds from now after which nobody wants it any more; None for no such time.
        preview_every: how many steps lie between previews; 0 for none.
        on_end: called once, when it has ended, with the kind of its last event.

    Attributes:
        size: width and height of its pictures.
        pixels_per_latent: of them.
        given_pixels: of the picture that was given, as the model takes it; 0 without one.
    """

    def __init__(
        self,
        request: Job,
        *,
        output_type: str = "pil",
        client: str = "",
        priority: int = 0,
        deadline: float | None = None,
        preview_every: int = 0,
        on_end: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self.request: Job | None = request  # until it has ended
        self.output_type = output_type
        self.size = _size(request)
        self.pixels_per_latent = request.components.autoencoder.config.downsample_factor**2
        given = request.image.pixels
        self.given_pixels = 0 if given is None else given.shape[-2] * given.shape[-1]
        self.client, self.priority, self.preview_every = client, priority, preview_every
        self.submitted = time.monotonic()
        self.deadline = None if deadline is None else self.submitted + deadline
        self.count = request.settings.count
        self.drawing: Drawing | None = None  # once it is prepared
        self.next_index = 0  # of the image to be admitted next
        self._on_end = on_end
        self._history = list[Event | None]()  # None where a newer preview has taken its place
        self._previews = dict[int, int]()  # image -> where its newest preview is
        self._pictures = dict[int, GeneratedImage]()
        self._changed = threading.Condition(threading.RLock())
        self._listeners = list[Callable[[Event], object]]()
        self._end: Event | None = None

    @property
    def status(self) -> str:
        """The kind of its last event, "waiting" before the first."""
        with self._changed:
            newest = next((event for event in reversed(self._history) if event is not None), None)
            return "waiting" if newest is None else newest.kind

    @property
    def ended(self) -> bool:
        """Whether it is done, failed or cancelled."""
        with self._changed:
            return self._end is not None

    @property
    def pictures(self) -> dict[int, GeneratedImage]:
        """Those that are drawn, by their numbers."""
        with self._changed:
            return dict(self._pictures)

    def past(self, after: int = 0) -> list[Event]:
        """Return what has happened, from the event after that of a number on."""
        with self._changed:
            return [event for event in self._history[max(0, after) :] if event is not None]

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield what has happened and what happens, up to the end; of several previews of an image the newest.

        Args:
            timeout: seconds to wait for the next event at most.

        Raises:
            TimeoutError: nothing happened in that time.
        """
        number, last = 0, ""
        while last not in ENDS:
            with self._changed:
                while not (found := self.past(number)):
                    if not self._changed.wait(timeout):
                        raise TimeoutError(f"nothing happened to the job in {timeout} seconds")
            for event in found:
                yield event
                number, last = event.number, event.kind

    async def stream(self, after: int = 0) -> AsyncIterator[Event]:
        """Yield the same in an event loop of asyncio, which is never blocked, from the event after `after` on."""
        loop, woken, number, last = asyncio.get_running_loop(), asyncio.Event(), after, ""
        forget = self.listen(lambda event: loop.call_soon_threadsafe(woken.set))
        try:
            while last not in ENDS:
                await woken.wait()
                woken.clear()
                for event in self.past(number):
                    yield event
                    number, last = event.number, event.kind
                if self.ended and not self.past(number):
                    return
        finally:
            forget()

    async def drawn(self) -> list[GeneratedImage]:
        """Wait for the pictures in an event loop of asyncio.

        Raises:
            LatentDiffError: there are none; see `result`.
        """
        found = dict[int, GeneratedImage]()
        async for event in self.stream():
            if event.error is not None:
                raise event.error
            if event.picture is not None and event.index is not None:
                found[event.index] = event.picture
        return [found[index] for index in sorted(found)]

    def listen(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Have a function called with every event so far, at once, and with those to come; return what ends that.

        It is called by the thread that draws, so it must be quick; after it has raised an exception, no more.
        """
        with self._changed:
            self._listeners.append(callback)
            for event in list(self._history):
                if event is not None:
                    self._tell(callback, event)

        def forget() -> None:
            with self._changed, suppress(ValueError):
                self._listeners.remove(callback)

        return forget

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the pictures.

        Args:
            timeout: seconds to wait at most; None for as long as it takes.

        Raises:
            TimeoutError: they are not drawn by then; the job goes on.
            JobCancelledError: it was cancelled.
            DeadlineError: its deadline has passed.
            LatentDiffError: it failed; the subclass and the message say why.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._end is not None, timeout):
                raise TimeoutError(f"the job was not done in {timeout} seconds")
            if self._end is not None and self._end.error is not None:
                raise self._end.error
            return Result.of([self._pictures[index] for index in range(self.count)])

    def cancel(self) -> None:
        """End the job; what is being drawn stops after its current step, and its place is free."""
        self.end("cancelled", JobCancelledError("the job was cancelled"))

    def expire(self, now: float) -> None:
        """End the job if its deadline has passed."""
        if self.deadline is not None and now >= self.deadline and not self.ended:
            late = f"{self.deadline - self.submitted:.3g} seconds"
            self.end("failed", DeadlineError(f"the job was to be done in {late}, and is not; give it more time"))

    def fail(self, error: Exception) -> None:
        """End the job with an error."""
        self.end("failed", error)

    def add(self, index: int, picture: GeneratedImage) -> None:
        """Take the picture of image `index`; with the last one the job is done."""
        with self._changed:
            if not self.ended:
                self._pictures[index] = picture
                self.emit(Event("picture", index, picture=picture))
                if len(self._pictures) == self.count:
                    self.end("done")

    def emit(self, event: Event) -> None:
        """Tell of an event, unless the job has ended."""
        with self._changed:
            if self.ended:
                return
            if event.preview is not None and event.index is not None:
                before = self._previews.get(event.index)
                if before is not None:
                    self._history[before] = None
                self._previews[event.index] = len(self._history)
            numbered = replace(event, number=len(self._history) + 1)
            self._history.append(numbered)
            self._changed.notify_all()
            for callback in list(self._listeners):
                self._tell(callback, numbered)

    def end(self, kind: str, error: Exception | None = None) -> None:
        """End the job, unless it has ended."""
        with self._changed:
            if self.ended:
                return
            last = Event(kind, error=error)
            self.emit(last)
            self._end, self.drawing, self.request = last, None, None  # with all that was prepared for it
            self._listeners.clear()
        self._on_end(kind)

    def _tell(self, callback: Callable[[Event], Any], event: Event) -> None:
        try:
            callback(event)
        except Exception:
            with suppress(ValueError):
                self._listeners.remove(callback)


def _size(request: Job) -> tuple[int, int]:
    """Return width and height of the pictures of a request."""
    if request.image.size is not None:
        return request.image.size
    factor = request.components.autoencoder.config.downsample_factor
    size = (request.image.height, request.image.width)
    height, width = hires_size(request.settings, size, factor) if request.settings.hires > 1 else size
    return width, height
