"""The application: all doors, with one form of errors, health and figures."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from latentdiff import __version__
from latentdiff.errors import LatentDiffError, shown
from latentdiff.serve.http.desk import Desk
from latentdiff.serve.http.errors import ApiError, ErrorAnswer, api_error
from latentdiff.serve.http.jobs import routes as jobs
from latentdiff.serve.http.jobs.shelf import Shelf
from latentdiff.serve.http.links import Links
from latentdiff.serve.http.metrics import registry
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.openai import routes as openai
from latentdiff.serve.http.webui import routes as webui

__all__ = ["make_app"]

REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}


def make_app(models: Models, desk: Desk, shelf: Shelf, links: Links, place: str = "") -> FastAPI:
    """Return the application; `guard.Guard` stands before it.

    Args:
        models: that are served.
        desk: takes what is asked for.
        shelf: keeps jobs.
        links: keep pictures that are answered as such.
        place: begins the names of jobs, as it does those of links.
    """
    app = FastAPI(title="latentdiff", version=__version__, docs_url=None, redoc_url=None, responses=REFUSALS)
    app.state.place = place
    _add_errors(app, desk)
    openai.add_routes(app, models, desk, links)
    webui.add_routes(app, models, desk)
    jobs.add_routes(app, models, desk, shelf)
    _add_health(app, desk)
    return app


def _add_errors(app: FastAPI, desk: Desk) -> None:
    async def answered(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            code = "no_such_route" if error.status_code in (404, 405) else "invalid_body"
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code)
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            param = str(first["loc"][-1])
            error = ApiError(400, f"{param}: {first['msg']}, got {shown(first['input'])}", "invalid_value", param)
        known = api_error(error, desk.retry_after)
        more = {"detail": str(known)} if request.url.path.startswith(webui.ROOT) else {}  # where its clients look
        return JSONResponse(known.body | more, known.status, known.headers)

    for kind in (ApiError, LatentDiffError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answered)


def _add_health(app: FastAPI, desk: Desk) -> None:
    figures = registry(desk.scheduler)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Say whether jobs are taken."""
        ready = not desk.draining and not desk.scheduler.closed
        return JSONResponse({"status": "ready" if ready else "closing"}, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return figures for Prometheus."""
        return Response(generate_latest(figures), media_type=CONTENT_TYPE_LATEST)
