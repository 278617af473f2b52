"""The door of the page: a browser gives the token once and has a cookie from then on; nothing outside is ever asked."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.guard import PAGE, token_of

__all__ = ["Door"]

COOKIE = "latentdiff"
# What a browser may load, and from where: from here.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "frame-ancestors 'none'",
        "form-action 'self'",
        "base-uri 'self'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
# Of gradio's own routes those that the page needs; others would fetch addresses, or run what is not asked for.
FILES = ("assets/", "static/", "svelte/", "theme.css", "config", "favicon.ico")
CALLS = ("queue/", "heartbeat/", "upload", "file=", "component_server", "reset", "cancel", "startup-events", "info")
NEEDED = (*FILES, *(f"gradio_api/{call}" for call in CALLS))
ASK = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>latentdiff</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; display: grid; place-content: center; min-height: 90vh; margin: 1rem }}
form {{ display: grid; gap: .75rem; width: min(22rem, 90vw) }} h1 {{ margin: 0 }}
input, button {{ font: inherit; padding: .6rem .8rem; border-radius: .5rem; border: 1px solid #78716c }}
button {{ background: #c2410c; border-color: #c2410c; color: #fff; font-weight: 600 }}
</style></head><body><main><form method="post" action="{action}"><h1>latentdiff</h1>{note}
<label for="token">Token of this server</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Open the page</button></form></main></body></html>
"""


class Door:
    """An application whose paths under `guard.PAGE` are for browsers.

    Args:
        app: the application.
        token: which a browser must bring once; None for none.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token
        self._pass = hmac.new((token or "").encode(), b"latentdiff page", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not (path == "/" or path == PAGE or path.startswith(f"{PAGE}/")):
            await self._app(scope, receive, send)
            return
        answer = await self._answer(Request(scope, receive), path)
        if answer is not None:
            answer.headers.update(HEADERS)
            await answer(scope, receive, send)
            return

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, hardened)

    async def _answer(self, request: Request, path: str) -> Response | None:
        """Return the answer of the door itself; None for one that is let in."""
        if path in ("/", PAGE):
            return RedirectResponse(f"{PAGE}/", 307)
        if path == f"{PAGE}/token" and request.method == "POST" and self._token is not None:
            return await self._enter(request, self._token)
        if not self._knows(request):
            if request.method == "GET" and path == f"{PAGE}/":
                return HTMLResponse(ASK.format(action=f"{PAGE}/token", note=""), 401)
            return _refused(ApiError(401, "the page is for those who gave this server's token", "invalid_api_key"))
        asked = path.removeprefix(f"{PAGE}/")
        if asked and (not asked.startswith(NEEDED) or asked.startswith("gradio_api/file=http")):
            return _refused(ApiError(404, "there is no such thing here", "no_such_route"))
        return None

    def _knows(self, request: Request) -> bool:
        if self._token is None:
            return True
        cookie, header = request.cookies.get(COOKIE, ""), request.headers.get("authorization", "")
        by_cookie = hmac.compare_digest(cookie.encode(), self._pass.encode())
        return hmac.compare_digest(token_of(header), self._token.encode()) or by_cookie

    async def _enter(self, request: Request, token: str) -> Response:
        try:
            fields = parse_qs((await request.body()).decode("latin-1"), max_num_fields=4)
        except ValueError:  # more of them
            fields = {}
        given = fields.get("token", [""])[0]
        if not hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode()):
            note = '<p role="alert">That is not the token of this server; try again.</p>'
            return HTMLResponse(ASK.format(action=f"{PAGE}/token", note=note), 401)
        entered = RedirectResponse(f"{PAGE}/", 303)
        entered.set_cookie(COOKIE, self._pass, httponly=True, samesite="strict", path=PAGE)
        return entered


def _refused(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)
