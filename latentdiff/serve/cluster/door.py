"""The door: checks requests as a single server does, and passes each to a replica, again where one dies of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from latentdiff.serve.cluster.options import Options
from latentdiff.serve.cluster.routes import Asked
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.guard import FILES, Guard, is_loopback
from latentdiff.serve.http.limits import Limits

__all__ = ["Door"]

ATTEMPTS = 4  # of one request, each at another replica, as those that died of it are gone
PASSED_ON = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
NAMED = re.compile(rf"^(?:/v1/jobs/job_|{re.escape(FILES)})(?P<replica>[A-Za-z0-9]+)\.")  # as replicas begin names
WEB_UI = "/sdapi/"
LORA = re.compile(r"<lora:([^:>]+)")


def front() -> ASGIApp:
    """Return the application that Serve calls: that of the door in this process."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await serve.get_replica_context().servable_object.guarded(scope, receive, send)

    return app


@serve.ingress(front)
class Door:
    """Stands before the replicas.

    Args:
        replicas: a handle of them.
        options: of the application.
    """

    def __init__(self, replicas: Any, options: Options) -> None:
        self.replicas, self.options = replicas.options(stream=True), options
        guard: Any = Guard(
            self.passed_on,
            token=options.secret,
            local=is_loopback(options.host) and not options.proxies,
            limits=Limits(),
        )
        self.guarded = ProxyHeadersMiddleware(guard, list(options.proxies)) if options.proxies else guard

    async def passed_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to a replica, and what it answers to the client; let go of it when the client has gone."""
        body = await _body(receive)
        passing = asyncio.ensure_future(self._answered(scope, body, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((passing, gone), return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                passing.cancel()
            with suppress(asyncio.CancelledError):
                await passing
        finally:
            gone.cancel()
            passing.cancel()

    async def _answered(self, scope: Scope, body: bytes, send: Send) -> None:
        asked = asked_of(scope, body, len(self.options.models) > 1 or self.options.lora_dir is not None)
        plain = {name: scope[name] for name in PASSED_ON if name in scope}
        plain |= {"headers": [tuple(pair) for pair in scope["headers"]], "client": scope.get("client")}
        plain["server"] = scope.get("server")
        for attempt in range(ATTEMPTS):
            started, answers = False, self.replicas.answer.remote(plain, body, asked=asked)
            try:
                async for message in answers:
                    if not started and attempt < ATTEMPTS - 1 and _closing(message):
                        break  # it was told to end after the request was sent to it
                    started = True
                    await send(message)
                if started:
                    return
            except RayActorError:
                if started:
                    raise  # the client has had a part of it, and may ask again
                logging.getLogger(__name__).warning("a replica died; its request goes to another")
            finally:
                answers.cancel()
        raise ApiError(503, "the machine that drew it was lost, several times; ask again", "replica_lost")


def asked_of(scope: Scope, body: bytes, weighs: bool) -> Asked:
    """Return what the way of a request depends on.

    Args:
        scope: of ASGI.
        body: of the request.
        weighs: whether replicas draw with different weights: several models, or LoRAs.
    """
    path, headers = str(scope["path"]), Headers(scope=scope)
    client = (scope.get("client") or ("",))[0]
    if (named := NAMED.match(path)) is not None:
        return Asked(replica=named["replica"])
    if path.startswith(WEB_UI):
        return Asked(client=client)
    if (key := headers.get("idempotency-key")) is not None:
        return Asked(client=f"{client}\0{key}")
    weights = _weights(headers, body) if weighs and scope["method"] == "POST" else None
    if "x-stainless-retry-count" not in headers:
        return Asked(weights=weights)
    content = body.replace(boundary, b"") if (boundary := _boundary(headers)) else body  # another each time
    return Asked(key=hashlib.sha256(f"{client}\0{path}\0".encode() + content).hexdigest(), weights=weights)


def _boundary(headers: Headers) -> bytes:
    """Return what is between the parts of a form."""
    return headers.get("content-type", "").partition("boundary=")[2].partition(";")[0].strip('" ').encode("latin-1")


def _weights(headers: Headers, body: bytes) -> str | None:
    """Return the model and the LoRAs of a request in JSON; None of others, which go to whoever is least busy."""
    if not headers.get("content-type", "").startswith("application/json"):
        return None
    try:
        fields = json.loads(body)
        loras = sorted({*LORA.findall(str(fields.get("prompt", ""))), *map(str, fields.get("lora") or ())})
        return json.dumps([str(fields.get("model")), loras])
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None


def _closing(message: Message) -> bool:
    """Say whether an answer begins with what a server says that takes no more jobs."""
    return message["type"] == "http.response.start" and message["status"] == 503


async def _body(receive: Receive) -> bytes:
    parts = list[bytes]()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
