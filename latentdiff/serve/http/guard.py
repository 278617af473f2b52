"""What stands before every route: who may ask, from which page, and how much may be sent in what time."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentdiff.errors import InputError, shown
from latentdiff.serve.http.errors import ApiError, api_error
from latentdiff.serve.http.limits import Limits

__all__ = ["FILES", "PAGE", "Guard", "check_proxies", "check_token", "is_loopback", "token_of"]

FILES = "/v1/images/files/"  # whose links are good without a token, and on any page
PAGE = "/ui"  # which has a door of its own, for browsers; `/` leads there
OPEN = ("/healthz", "/readyz", "/", PAGE)
# Where pictures come in JSON.
IN_JSON = ("/v1/jobs", "/sdapi/v1/img2img", "/sdapi/v1/extra-single-image", "/sdapi/v1/png-info")
TOKEN = re.compile(r"[\x21-\x7e]{16,512}")


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_proxies(proxies: Sequence[str]) -> None:
    """Raise InputError unless each is an address or a network, and not all there are."""
    for proxy in proxies:
        try:
            everyone = ipaddress.ip_network(proxy).prefixlen == 0
        except ValueError:
            everyone = True
        if everyone:
            raise InputError(
                f"a proxy must be an address or a network as 10.0.0.0/24, got {shown(proxy)}; try 127.0.0.1"
            )


def check_token(token: str | None, host: str, proxies: Sequence[str] = ()) -> None:
    """Raise InputError unless a token can be used, and is there where it must be.

    Args:
        token: that requests must bring; None for none.
        host: where the server listens.
        proxies: through which others reach it even there.
    """
    remedy = 'try $(python -c "import secrets; print(secrets.token_urlsafe())")'
    if token is None and (proxies or not is_loopback(host)):
        way = "a proxy" if proxies else f"host {shown(host)}"
        raise InputError(f"a server that others reach needs a token, got {way} without one; {remedy}")
    if token is not None and not TOKEN.fullmatch(token):
        raise InputError(f"a token must be 16 to 512 printable characters without spaces, got another; {remedy}")


class Guard:
    """An application behind checks, every answer of which has a number, `x-request-id`.

    Args:
        app: the application.
        token: which every request must bring; None for none.
        local: whether requests must be addressed to this machine by a name of its own (so that no page of another name
            that is made to point here is answered).
        limits: of bodies.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, local: bool, limits: Limits) -> None:
        self._app, self._token, self._local, self._limits = app, token, local, limits
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, started = f"req_{secrets.token_hex(12)}", False

        async def numbered(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        self._requests += 1
        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            await self._app(scope, self._limited(scope["path"], headers, receive), numbered)
        except Exception as error:
            if started:  # the application has answered, and logged it
                return
            answer = api_error(error)
            closing = {**answer.headers, "connection": "close"}  # a body may not have been read
            await JSONResponse(answer.body, answer.status, closing)(scope, receive, numbered)
        finally:
            self._requests -= 1

    def _check(self, scope: Scope, headers: Headers) -> None:
        host, path = headers.get("host", ""), str(scope["path"])
        called = _split(f"//{host}")
        if called is None:
            raise ApiError(400, f"Host must be the name of a machine, got {shown(host)}; mend it", "invalid_host")
        if self._local and not is_loopback(called.hostname or ""):
            raise ApiError(403, f"this server is called localhost, got {shown(host)}; use that", "host_not_allowed")
        if self._requests > self._limits.requests and path not in OPEN:
            raise self._limits.exceeded("requests", f"{self._limits.requests} requests are being answered; try later")
        file = path.startswith(FILES) and scope["method"] in ("GET", "HEAD")
        if not file:
            self._check_page(host, headers)
        if self._token is not None and not file and path not in OPEN and not path.startswith(f"{PAGE}/"):
            given = token_of(headers.get("authorization", ""))
            if not hmac.compare_digest(given, self._token.encode()):
                message = "the request must bring this server's token, as OpenAI's clients send api_key"
                raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_page(self, host: str, headers: Headers) -> None:
        """Refuse requests that a browser sends for the page of another server."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        page = None if origin is None else _split(origin)
        foreign = origin is not None and (page is None or page.netloc != host)
        if foreign or site not in ("none", "same-origin"):
            raise ApiError(403, "requests from the pages of other servers are refused", "origin_not_allowed")

    def _limited(self, path: str, headers: Headers, receive: Receive) -> Receive:
        """Return a `receive` that raises ApiError where a body is too large, or takes too long."""
        pictures = headers.get("content-type", "").startswith("multipart/") or path in IN_JSON
        name = "upload_bytes" if pictures else "json_bytes"
        most, seconds = getattr(self._limits, name), self._limits.body_seconds
        end, got, complete = time.monotonic() + seconds, 0, False
        large = self._limits.exceeded(name, f"the body must have at most {most:,} bytes, got more; send less")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdecimal() and int(length) > most:
            raise large

        async def limited() -> Message:
            nonlocal got, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                message_ = f"the body must come within {seconds} seconds, and did not; send it faster"
                raise self._limits.exceeded("body_seconds", message_) from None
            got += len(message.get("body", b""))
            if got > most:
                raise large
            complete = not message.get("more_body", False)
            return message

        return limited


def _split(address: str) -> SplitResult | None:
    """Return the parts of an address; None of what is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return None


def token_of(header: str) -> bytes:
    """Return the token of a header: that of `Bearer TOKEN`, or the password of `Basic`, as clients of web UIs send."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return value.encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
