"""What several servers behind one address share through Redis: answers to repeats, and jobs that have ended."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from redis import Redis as BlockingRedis
from redis import RedisError
from redis.asyncio import Redis
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentdiff.errors import InputError
from latentdiff.serve.http.desk import client_of, key_reused
from latentdiff.serve.http.jobs.routes import ROOT
from latentdiff.serve.http.jobs.shelf import Kept, Shelf
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.sse import events_after, last_seen

__all__ = ["Shared", "check_redis"]

T = TypeVar("T")
PREFIX = "latentdiff:"
LEASE = 15  # seconds after which a server that answered, and says no more of it, is taken for gone
ASKED = 0.25  # seconds between looks whether another server has answered
LARGEST = 64 * 2**20  # bytes of an answer that is kept
REACHED, ANSWERED = 2.0, 5.0  # seconds in which Redis is, or else it does not answer
PASSED_ON = ("content-type", "cache-control", "location")  # and what is ours, `x-latentdiff-...`
BOUNDARY = re.compile(r'boundary="?([^";, ]+)')
JOB = re.compile(rf"({ROOT}/[^/]+)(/.*)?")


@dataclass
class Answer:
    """An answer to a request, whole or not yet.

    Attributes:
        digest: of the request.
        server: that is answering; empty when it has answered.
        status: of HTTP; 0 while there is none.
        headers, body: of it.
        whole: whether the body has ended.
    """

    digest: str = ""
    server: str = ""
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    whole: bool = False

    def add(self, message: Message) -> None:
        """Take a message of the application."""
        if message["type"] == "http.response.start":
            named = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in message["headers"]]
            self.status = message["status"]
            self.headers = [one for one in named if one[0] in PASSED_ON or one[0].startswith("x-latentdiff-")]
        elif message["type"] == "http.response.body":
            if len(self.body) <= LARGEST:
                self.body += message.get("body", b"")
            self.whole = not message.get("more_body", False)

    @property
    def good(self) -> bool:
        """Whether it is one that a repeat may have too: the whole of it, with pictures."""
        streamed = dict(self.headers).get("content-type", "").startswith("text/event-stream")
        broken = streamed and any(event.startswith(b"event: error\n") for event in self.body.split(b"\n\n"))
        return self.whole and 200 <= self.status < 300 and len(self.body) <= LARGEST and not broken

    def packed(self) -> bytes:
        """Return it as it is kept."""
        return json.dumps([self.digest, self.server, self.status, self.headers]).encode() + b"\n" + bytes(self.body)

    @classmethod
    def unpacked(cls, data: bytes) -> Answer:
        """Return one that was kept."""
        head, _, body = data.partition(b"\n")
        digest, server, status, headers = json.loads(head)
        return cls(digest, server, status, [(name, value) for name, value in headers], bytearray(body), True)

    async def send(self, send: Send) -> None:
        """Answer with it."""
        body = bytes(self.body)
        pairs = [*self.headers, ("content-length", str(len(body)))]
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Shared:
    """An application before which repeats are answered with what another server has answered, or is about to.

    A POST with an `Idempotency-Key` is answered by one server; the others wait for that answer and give the same. Jobs
    that have ended are told of by any server, and their pictures with them, also when the one that drew them is gone.
    When Redis does not answer, each server works on alone, and its log says so.

    Args:
        app: the application; `guard.Guard` stands before.
        shelf: keeps the jobs of this server.
        limits: for how long a job is kept.
        url: of Redis; see `check_redis`.
    """

    def __init__(self, app: ASGIApp, shelf: Shelf, limits: Limits, url: str) -> None:
        self._app, self._shelf, self._limits, self._me = app, shelf, limits, secrets.token_hex(8)
        self._redis = Redis.from_url(url, socket_connect_timeout=REACHED, socket_timeout=ANSWERED)
        shelf.on_end = self._keep

    async def close(self) -> None:
        """Let go of the connections."""
        await self._redis.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        job, headers = JOB.fullmatch(scope["path"]), Headers(scope=scope)
        if scope["method"] == "POST" and headers.get("idempotency-key"):
            await self._once(scope, receive, send)
        elif job is not None and scope["method"] in ("GET", "DELETE"):
            await self._of_job(scope, receive, send, job[1])
        else:
            await self._app(scope, receive, send)

    async def _once(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with a key, or wait for another server that does."""
        request = Request(scope, receive)
        body = await request.body()
        key, digest = f"key:{_hash(client_of(request), request.headers['idempotency-key'])}", _digest(request, body)
        mine, sent = Answer(digest, self._me), False

        async def given() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        while not await self._asked(self._redis.set(PREFIX + key, mine.packed(), nx=True, ex=LEASE)):
            found = await self._settled(key, receive)
            if found is None:
                if await self._asked(self._redis.ping()):
                    continue  # the other one has failed, or is gone
                break
            if found.digest != digest:
                error = key_reused()
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
            if found.server:
                await self._app(scope, given, send)  # where it joins the one that this server is answering
            else:
                await found.send(send)
            return
        answer, renewing = Answer(digest), asyncio.ensure_future(self._renew(key))
        try:
            await self._app(scope, given, _both(answer, send))
        finally:
            renewing.cancel()
            if answer.good:
                await self._store(key, answer)
            else:
                await self._asked(self._redis.delete(PREFIX + key))

    async def _settled(self, key: str, receive: Receive) -> Answer | None:
        """Return what is known of a key when no other server is answering it any more; None for nothing.

        Raises:
            ClientDisconnect: the client has gone.
        """
        gone = asyncio.ensure_future(receive())
        try:
            while True:
                found = await self._find(key)
                if found is None or found.server in ("", self._me):
                    return found
                if (await asyncio.wait({gone}, timeout=ASKED))[0]:
                    raise ClientDisconnect
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone

    async def _renew(self, key: str) -> None:
        while True:
            await asyncio.sleep(LEASE / 3)
            await self._asked(self._redis.expire(PREFIX + key, LEASE))

    async def _keep(self, kept: Kept) -> None:
        """Keep what is answered about a job that has ended, so that any server can tell of it."""
        place, known = f"{ROOT}/{kept.id}", (set(kept.fetched), kept.told)
        for path in (*(f"{place}/images/{index}" for index in kept.job.pictures), f"{place}/events", place):
            answer = Answer()
            await self._app(_asking(path), _never, _both(answer))
            if not answer.good or not await self._store(path, answer):
                kept.fetched, kept.told = known  # as no client has them
                return
        kept.told = True

    async def _of_job(self, scope: Scope, receive: Receive, send: Send, place: str) -> None:
        """Answer about a job: of this server, or one that has ended at another."""
        path, here = scope["path"], self._shelf.has(place.removeprefix(f"{ROOT}/"))
        answer = None if here else await self._find(path)
        if scope["method"] == "DELETE":
            parts = ("", "/events", *(f"/images/{index}" for index in range(self._limits.n)))
            await self._asked(self._redis.delete(*(f"{PREFIX}{place}{part}" for part in parts)))
        if answer is None:
            await self._app(scope, receive, send)
            return
        if path.endswith("/events"):
            request = Request(scope)
            after = request.query_params.get("after", "")
            number = last_seen(request.headers, int(after) if after.isdecimal() else 0)
            answer.body = bytearray(events_after(bytes(answer.body), number))
        await answer.send(send)

    async def _find(self, name: str) -> Answer | None:
        """Return an answer that is kept."""
        data = await self._asked(self._redis.get(PREFIX + name))
        return Answer.unpacked(data) if isinstance(data, bytes) else None

    async def _store(self, name: str, answer: Answer) -> bool:
        """Keep an answer as long as jobs are kept; return whether it is."""
        kept = self._redis.set(PREFIX + name, answer.packed(), ex=self._limits.job_seconds)
        return bool(await self._asked(kept))

    async def _asked(self, question: Awaitable[T]) -> T | None:
        """Return what Redis answers; None where it does not."""
        try:
            return await question
        except RedisError as error:
            logging.getLogger(__name__).warning("Redis does not answer, so nothing is shared now: %s", error)
            return None


def check_redis(url: str) -> None:
    """Raise InputError unless Redis answers at a URL, such as redis://:password@host:6379/0."""
    try:
        client = BlockingRedis.from_url(url, socket_connect_timeout=REACHED, socket_timeout=ANSWERED)
    except ValueError as error:
        raise InputError(f"--redis must be a URL of Redis ({error}); try redis://localhost:6379/0") from error
    try:
        client.ping()
    except RedisError as error:
        where = client.connection_pool.connection_kwargs
        place = f"{where.get('host', where.get('path', 'localhost'))}:{where.get('port', 6379)}"
        raise InputError(f"no Redis answers at {place} ({error}); start it, or check --redis") from error
    finally:
        client.close()


def _digest(request: Request, body: bytes) -> str:
    """Return what is the same of requests with the same content, whatever marks the parts of a form."""
    found = BOUNDARY.search(request.headers.get("content-type", ""))
    if found is not None:
        body = body.replace(found[1].encode("latin-1"), b"")
    return _hash(request.url.path, hashlib.sha256(body).hexdigest())


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _both(answer: Answer, send: Send | None = None) -> Send:
    """Return a `send` that an answer is taken from."""

    async def taken(message: Message) -> None:
        answer.add(message)
        if send is not None:
            await send(message)

    return taken


def _asking(path: str) -> Scope:
    """Return a request of our own."""
    asgi = {"version": "3.0", "spec_version": "2.3"}
    place = {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http"}
    return {"type": "http", "asgi": asgi, "http_version": "1.1", "method": "GET", "headers": [], **place}


async def _never() -> Message:
    """Wait as for a client that says no more."""
    return await asyncio.get_running_loop().create_future()
