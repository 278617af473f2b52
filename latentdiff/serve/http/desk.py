"""Where requests become jobs: repeats join the job they repeat, and a job that nobody waits for is cancelled."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from starlette.requests import Request

from latentdiff.errors import ClosedError
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.orders import Order
from latentdiff.serve.jobs import ENDS, Event, ServedJob
from latentdiff.serve.scheduler import Scheduler

__all__ = ["Claim", "Desk", "Taken"]

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
    """

    client: str
    digest: str
    key: str | None = None
    repeats: int | None = None

    @classmethod
    def of(cls, request: Request, digest: str) -> Claim:
        """Return that of a request."""
        count, key = request.headers.get("x-stainless-retry-count", ""), request.headers.get("idempotency-key")
        counted = int(count) if count.isascii() and count.isdecimal() and len(count) < 4 else None
        client = "" if request.client is None else request.client.host
        return cls(client, digest, key or None, counted)

    @property
    def repeatable(self) -> bool:
        """Whether the client may repeat it in a way that can be told from a first call."""
        return self.key is not None or self.repeats is not None


@dataclass(eq=False)
class Taken:
    """A job that was taken, and for whom.

    Attributes:
        claim, order: of the first request.
        submitted: gives the job when it is handed in.
        waiters: requests that are to be answered with it.
        ended: when it ended, on the clock of `time.monotonic`; 0 while it has not.
        failed: whether there are no pictures.
    """

    claim: Claim
    order: Order
    submitted: asyncio.Future[ServedJob]
    waiters: int = 0
    ended: float = 0.0
    failed: bool = False


class Desk:
    """Takes orders to a scheduler; all of it is for the thread of the event loop.

    Args:
        scheduler: draws them.
        limits: of jobs.
    """

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self.scheduler, self.limits, self.draining = scheduler, limits, False
        self._jobs = Counter[str]()  # of each client
        self._repeatable = list[Taken]()

    @property
    def busy(self) -> bool:
        """Whether a job has not ended."""
        return bool(self._jobs.total())

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room, by how long jobs took of late."""
        stats = self.scheduler.stats()
        rounds = 1 + stats.waiting / self.scheduler.batch
        return max(1, min(60, round(25 * stats.step_seconds * rounds)))

    @asynccontextmanager
    async def served(self, order: Order, claim: Claim, request: Request) -> AsyncIterator[Taken]:
        """Hand an order in, unless it is a repeat, and let go of the job at the end, or when the client has gone.

        Raises:
            ApiError: the client has too many jobs.
            ClosedError: no more are taken.
            LatentDiffError: as `Scheduler.submit`.
        """
        taken = self._repeated(claim) or self._hand_in(order, claim)
        taken.waiters += 1
        gone = asyncio.ensure_future(_gone(request))
        gone.add_done_callback(lambda task: self._release(taken))  # at the end too, when it is cancelled
        try:
            await asyncio.shield(taken.submitted)
            yield taken
        finally:
            gone.cancel()

    async def stop(self) -> None:
        """Take no more jobs, and end those there are."""
        self.draining = True
        await asyncio.to_thread(self.scheduler.close, False)

    def _repeated(self, claim: Claim) -> Taken | None:
        """Return the job that a request repeats; of several that one whose client has gone."""
        if claim.key is not None:
            named = [one for one in self._kept() if (one.claim.client, one.claim.key) == (claim.client, claim.key)]
            if named and named[-1].claim.digest != claim.digest:
                message = "the Idempotency-Key came with another request before; use another"
                raise ApiError(409, message, "idempotency_key_reused")
            return named[-1] if named else None
        if not claim.repeats:
            return None
        same = [
            one
            for one in self._kept()
            if (one.claim.client, one.claim.digest) == (claim.client, claim.digest) and one.claim.key is None
        ]
        return min(reversed(same), key=lambda one: one.waiters, default=None)

    def _kept(self) -> list[Taken]:
        """Return the jobs that can be joined."""
        oldest = time.monotonic() - KEPT_SECONDS
        fit = [one for one in self._repeatable if not one.failed and (not one.ended or one.ended > oldest)]
        extra = [one for one in fit if one.ended][:-MOST_KEPT]
        self._repeatable = [one for one in fit if one not in extra]
        return self._repeatable

    def _hand_in(self, order: Order, claim: Claim) -> Taken:
        if self.draining:
            raise ClosedError("the server is shutting down")
        if self._jobs[claim.client] >= self.limits.client_jobs:
            message = f"a client may have {self.limits.client_jobs} jobs at once; wait for one of them"
            raise self.limits.exceeded("client_jobs", message, retry_after=self.retry_after)
        taken = Taken(claim, order, asyncio.ensure_future(asyncio.to_thread(self._submit, order, claim.client)))
        self._jobs[claim.client] += 1
        taken.submitted.add_done_callback(lambda submitted: self._submitted(taken))
        if claim.repeatable:
            self._kept().append(taken)
        return taken

    def _submit(self, order: Order, client: str) -> ServedJob:
        every = max(1, order.steps // (order.partial_images + 1)) if order.partial_images else 0
        return self.scheduler.submit(
            client=client, deadline=self.limits.seconds, preview_every=every, pipe=order.pipe, **order.options
        )

    def _submitted(self, taken: Taken) -> None:
        if taken.submitted.cancelled() or taken.submitted.exception() is not None:
            self._ended(taken, failed=True)
            return
        loop = asyncio.get_running_loop()

        def on_event(event: Event) -> None:
            if event.kind in ENDS:
                loop.call_soon_threadsafe(self._ended, taken, event.kind != "done")

        taken.submitted.result().listen(on_event)
        self._abandon(taken)  # if its client has gone meanwhile

    def _ended(self, taken: Taken, failed: bool) -> None:
        taken.ended, taken.failed = time.monotonic(), failed
        self._jobs[taken.claim.client] -= 1
        self._jobs += Counter()  # lets go of clients without jobs
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
        if not taken.waiters and not taken.ended and taken.submitted.done():
            with suppress(Exception):
                taken.submitted.result().cancel()


async def _gone(request: Request) -> None:
    """Return when the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
