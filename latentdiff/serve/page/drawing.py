"""Drawing for a page: a job of the desk, told of as it goes on, cancelled when the page asks or has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request

from latentdiff.generation.result import GeneratedImage
from latentdiff.serve.http.desk import Claim, Desk
from latentdiff.serve.http.errors import api_error
from latentdiff.serve.http.links import Links
from latentdiff.serve.http.models import Models
from latentdiff.serve.jobs import Event, ServedJob
from latentdiff.serve.page.asked import page_order
from latentdiff.serve.page.stage import THUMB, Drawn, Tile, small_picture

__all__ = ["News", "Studio"]

PAUSE = 0.15  # seconds between two looks of a page at its drawing


@dataclass
class News:
    """What a page is told.

    Attributes:
        says: in words.
        tiles: of the pictures in the making.
        drawn: the pictures, at the end.
        failed: whether there will be none, and `says` says why.
    """

    says: str = ""
    tiles: list[Tile] = field(default_factory=list)
    drawn: Drawn | None = None
    failed: bool = False


class Studio:
    """Draws for all pages; it is for the thread of the event loop.

    Args:
        models: that are served.
        desk: takes the jobs.
        links: keep the pictures.
    """

    def __init__(self, models: Models, desk: Desk, links: Links) -> None:
        self.models, self.desk, self.links = models, desk, links
        self._leaving = dict[str, asyncio.Event]()

    def leave(self, page: str) -> None:
        """Cancel what is being drawn for a page, by its name."""
        if page in self._leaving:
            self._leaving[page].set()

    def picture(self, link: str) -> bytes:
        """Return the bytes of a picture that was drawn.

        Raises:
            ApiError: it is kept no longer.
        """
        address = urlsplit(link)
        query = parse_qs(address.query)
        kept = self.links.find(address.path.rpartition("/")[2], query["expires"][0], query["signature"][0])
        return kept.data

    async def draw(self, values: Mapping[str, Any], page: str, client: str) -> AsyncIterator[News]:
        """Yield what happens to a request, at last its pictures or why there are none.

        Args:
            values: of the controls.
            page: its name; of one page the newer request takes the place of the older.
            client: whose it is, as the desk counts.
        """
        self.leave(page)
        left = self._leaving[page] = asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        try:
            order = await asyncio.to_thread(page_order, values, self.models, self.desk.limits)
            claim = Claim(client, digest="")
            async with self.desk.served(order, claim, Request({"type": "http"}, receive), "page") as job:
                async for news in self._told(job, values):
                    yield news
        except Exception as error:
            if left.is_set():
                yield News("Cancelled.", failed=True)
            else:
                yield News(str(api_error(error, self.desk.retry_after)), failed=True)
        finally:
            left.set()
            if self._leaving.get(page) is left:
                del self._leaving[page]

    async def _told(self, job: ServedJob, values: Mapping[str, Any]) -> AsyncIterator[News]:
        tiles, pictures = [Tile() for _ in range(job.count)], dict[int, tuple[GeneratedImage, str]]()
        started = told = time.monotonic()
        yield News(self._place(job), tiles)
        untold = False
        async for event in _with_pauses(job.stream()):
            if event is None:
                if untold:  # nothing has come since to tell it with
                    untold, told = False, time.monotonic()
                    yield News(self._progress(tiles), tiles)
                continue
            if event.error is not None:
                raise event.error
            if event.index is None:
                continue
            tile = tiles[event.index]
            tile.step, tile.steps = max(tile.step, event.step), event.steps or tile.steps
            if event.preview is not None:
                tile.source = small_picture(event.preview)
            if event.picture is not None:
                data = await asyncio.to_thread(event.picture.encoded)
                tile.source, tile.done = self.links.add(data, "png"), True
                pictures[event.index] = event.picture, tile.source
            untold = True
            if time.monotonic() - told > PAUSE or event.kind in ("admitted", "picture"):
                untold, told = False, time.monotonic()
                yield News(self._progress(tiles), tiles)
        kept = [pictures[index] for index in sorted(pictures)]
        drawn = _drawn(values, [one for one, _ in kept], [link for _, link in kept])
        yield News(f"Done in {time.monotonic() - started:.1f} s.", tiles, drawn)

    def _place(self, job: ServedJob) -> str:
        waiting = self.desk.scheduler.stats().waiting - 1
        return (
            f"Waiting; {waiting} other {'jobs wait' if waiting > 1 else 'job waits'}." if waiting > 0 else "Preparing…"
        )

    def _progress(self, tiles: list[Tile]) -> str:
        done, step = sum(tile.done for tile in tiles), sum(tile.step for tile in tiles)
        steps = sum(tile.steps for tile in tiles)
        if len(tiles) == 1:
            return f"Step {step} of {steps}." if step < steps else "Decoding…"
        return f"{done} of {len(tiles)} pictures are done, {step} of {steps} steps." if steps else "Preparing…"


async def _with_pauses(events: AsyncIterator[Event]) -> AsyncIterator[Event | None]:
    """Yield events, and None whenever none has come for `PAUSE`."""
    coming: asyncio.Future[Event] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            if not (await asyncio.wait({coming}, timeout=PAUSE))[0]:
                yield None
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield event
    finally:
        if coming is not None:
            coming.cancel()


def _drawn(values: Mapping[str, Any], pictures: list[GeneratedImage], links: list[str]) -> Drawn:
    first = pictures[0]
    again = {**values, "seed": str(first.seed)}
    return Drawn(
        prompt=str(values.get("prompt") or ""),
        links=links,
        seeds=[one.seed for one in pictures],
        thumb=small_picture(first.image.copy(), THUMB),
        size=first.image.size,
        values=again,
        notes=tuple(dict.fromkeys(note for one in pictures for note in one.notes)),
    )
