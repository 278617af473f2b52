"""Where requests become jobs: repeats join the job they repeat, and a job that nobody waits for is cancelled."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from starlette.requests import Request

from latentdiff.errors import ClosedError
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.orders import Order
from latentdiff.serve.jobs import ENDS, Event, ServedJob
from latentdiff.serve.scheduler import Scheduler

__all__ = ["Claim", "Desk", "Taken", "client_of", "key_reused"]

PATIENCE = 5.0  # seconds in which a client that repeats by itself comes again
KEPT_SECONDS, MOST_KEPT = 120, 32  # how long jobs that ended can be joined, and how many


@dataclass(frozen=True)
class Claim:
    """What tells whether a request repeats another.

    Attributes:
        client: who asks.
        digest: of route and content.
        key: `Idempotency-Key`.
        repeats: how many times the client has sent it before, by its own count; None where it does not count.
        name: what the client calls the job.
    """

    client: str
    digest: str
    key: str | None = None
    repeats: int | None = None
    name: str = field(default_factory=lambda: f"job_{secrets.token_urlsafe(16)}")

    @classmethod
    def of(cls, request: Request, digest: str) -> Claim:
        """Return that of a request."""
        count, key = request.headers.get("x-stainless-retry-count", ""), request.headers.get("idempotency-key")
        counted = int(count) if count.isascii() and count.isdecimal() and len(count) < 4 else None
        place = getattr(request.app.state, "place", "")
        return cls(client_of(request), digest, key or None, counted, f"job_{place}{secrets.token_urlsafe(16)}")

    @property
    def repeatable(self) -> bool:
        """Whether the client may repeat it in a way that can be told from a first call."""
        return self.key is not None or self.repeats is not None


def client_of(request: Request) -> str:
    """Return who asks, by the address."""
    return "" if request.client is None else request.client.host


def key_reused() -> ApiError:
    """Return the error of a key that came with another request before."""
    message = "the Idempotency-Key came with another request before; use another"
    return ApiError(409, message, "idempotency_key_reused")


@dataclass(eq=False)
class Taken:
    """A job that was taken, and for whom.

    Attributes:
        claim: of the first request.
        door: that it came through.
        submitted: gives the job when it is handed in.
        waiters: requests that are to be answered with it.
        ended: when it ended, on the clock of `time.monotonic`; 0 while it has not.
        failed: whether there are no pictures.
    """

    claim: Claim
    door: str
    submitted: asyncio.Future[ServedJob]
    waiters: int = 0
    ended: float = 0.0
    failed: bool = False

    @property
    def job(self) -> ServedJob | None:
        """The job, once it is handed in."""
        done = self.submitted.done() and not self.submitted.cancelled() and self.submitted.exception() is None
        return self.submitted.result() if done else None

    def cancel(self) -> None:
        """Cancel the job."""
        if self.job is not None:
            self.job.cancel()


class Desk:
    """Takes orders to a scheduler; all of it is for the thread of the event loop.

    Args:
        scheduler: draws them.
        limits: of jobs.
    """

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self.scheduler, self.limits, self.draining = scheduler, limits, False
        self._running, self._repeatable = list[Taken](), list[Taken]()

    @property
    def busy(self) -> bool:
        """Whether a job has not ended."""
        return bool(self._running)

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room, by how long jobs took of late."""
        stats = self.scheduler.stats()
        rounds = 1 + stats.waiting / self.scheduler.batch
        return max(1, min(60, round(25 * stats.step_seconds * rounds)))

    def running(self, client: str, door: str) -> list[Taken]:
        """Return the jobs of a client that came through a door and have not ended, the oldest first."""
        return [one for one in self._running if (one.claim.client, one.door) == (client, door)]

    @asynccontextmanager
    async def served(self, order: Order, claim: Claim, request: Request, door: str) -> AsyncIterator[ServedJob]:
        """Hand an order in, unless it is a repeat, and let go of the job at the end, or when the client has gone.

        Raises:
            ApiError: the client has too many jobs.
            ClosedError: no more are taken.
            LatentDiffError: as `Scheduler.submit`.
        """
        taken = self.repeated(claim) or self.hand_in(order, claim, door)
        taken.waiters += 1
        gone = asyncio.ensure_future(_gone(request))
        gone.add_done_callback(lambda task: self._release(taken))  # at the end too, when it is cancelled
        try:
            yield await asyncio.shield(taken.submitted)
        finally:
            gone.cancel()

    async def stop(self) -> None:
        """Take no more jobs, and end those there are."""
        self.draining = True
        await asyncio.to_thread(self.scheduler.close, False)

    def repeated(self, claim: Claim) -> Taken | None:
        """Return the job that a request repeats; of several that one whose client has gone.

        Raises:
            ApiError: its key came with another content before.
        """
        if claim.key is not None:
            named = [one for one in self._kept() if (one.claim.client, one.claim.key) == (claim.client, claim.key)]
            if named and named[-1].claim.digest != claim.digest:
                raise key_reused()
            return named[-1] if named else None
        if not claim.repeats:
            return None
        same = [
            one
            for one in self._kept()
            if (one.claim.client, one.claim.digest) == (claim.client, claim.digest) and one.claim.key is None
        ]
        return min(reversed(same), key=lambda one: one.waiters, default=None)

    def hand_in(self, order: Order, claim: Claim, door: str) -> Taken:
        """Hand an order in as a job of its own.

        Raises:
            ApiError: the client has too many jobs.
            ClosedError: no more are taken.
        """
        if self.draining:
            raise ClosedError("the server is shutting down")
        if sum(one.claim.client == claim.client for one in self._running) >= self.limits.client_jobs:
            message = f"a client may have {self.limits.client_jobs} jobs at once; wait for one of them"
            raise self.limits.exceeded("client_jobs", message, retry_after=self.retry_after)
        submitted = asyncio.ensure_future(asyncio.to_thread(self._submit, order, claim.client))
        taken = Taken(claim, door, submitted)
        self._running.append(taken)
        submitted.add_done_callback(lambda future: self._submitted(taken))
        if claim.repeatable:
            self._kept().append(taken)
        return taken

    def _kept(self) -> list[Taken]:
        """Return the jobs that can be joined."""
        oldest = time.monotonic() - KEPT_SECONDS
        fit = [one for one in self._repeatable if not one.failed and (not one.ended or one.ended > oldest)]
        extra = [one for one in fit if one.ended][:-MOST_KEPT]
        self._repeatable = [one for one in fit if one not in extra]
        return self._repeatable

    def _submit(self, order: Order, client: str) -> ServedJob:
        return self.scheduler.submit(
            client=client,
            priority=order.priority,
            deadline=order.deadline or self.limits.seconds,
            preview_every=order.preview_every,
            pipe=order.pipe,
            **order.options,
        )

    def _submitted(self, taken: Taken) -> None:
        if taken.job is None:
            self._ended(taken, failed=True)
            return
        loop = asyncio.get_running_loop()

        def on_event(event: Event) -> None:
            if event.kind in ENDS:
                loop.call_soon_threadsafe(self._ended, taken, event.kind != "done")

        taken.job.listen(on_event)
        self._abandon(taken)  # if its client has gone meanwhile

    def _ended(self, taken: Taken, failed: bool) -> None:
        taken.ended, taken.failed = time.monotonic(), failed
        self._running.remove(taken)
        self._kept()

    def _release(self, taken: Taken) -> None:
        """Let go of a job for one request."""
        taken.waiters -= 1
        if taken.claim.repeatable and not taken.ended:
            asyncio.get_running_loop().call_later(PATIENCE, self._abandon, taken)
        else:
            self._abandon(taken)

    def _abandon(self, taken: Taken) -> None:
        """Cancel a job that nobody waits for."""
        if not taken.waiters and not taken.ended:
            with suppress(Exception):
                taken.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
