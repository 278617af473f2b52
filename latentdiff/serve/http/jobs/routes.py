"""The routes of jobs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel

from latentdiff.serve.http.bodies import json_body, require_json
from latentdiff.serve.http.desk import Claim, Desk
from latentdiff.serve.http.errors import ApiError, ErrorDetails
from latentdiff.serve.http.fields import read_object, validated
from latentdiff.serve.http.jobs.orders import FORMATS, JobRequest, make_order
from latentdiff.serve.http.jobs.shelf import Kept, Shelf
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.sse import last_seen, sse_event
from latentdiff.serve.jobs import Event
from latentdiff.serve.progress import progress_of

__all__ = ["ROOT", "add_routes"]

ROOT = "/v1/jobs"  # and below, what is of one


class ImageState(BaseModel):
    """How far a picture is, and where it is when it is drawn."""

    index: int
    status: str
    step: int
    steps: int
    seed: int | None
    url: str | None
    preview_url: str | None


class JobState(BaseModel):
    """How far a job is."""

    id: str
    object: str
    status: str
    created: int
    model: str
    size: str
    when_gone: str
    images: list[ImageState]
    error: ErrorDetails | None


def add_routes(app: FastAPI, models: Models, desk: Desk, shelf: Shelf) -> None:
    """Add the routes to an application."""

    @app.post(ROOT, status_code=202, response_model=JobState, openapi_extra=json_body(JobRequest))
    async def hand_in(request: Request) -> JSONResponse:
        """Hand in a job."""
        kept = await _handed_in(request, models, desk, shelf)
        return JSONResponse(_state(kept), 202, {"location": f"{ROOT}/{kept.id}"})

    @app.get(ROOT + "/{name}", response_model=JobState)
    async def state(name: str) -> dict[str, Any]:
        """Say how far a job is."""
        kept = shelf.find(name)
        kept.told |= kept.status == "failed"
        return _state(kept)

    @app.delete(ROOT + "/{name}", response_model=JobState)
    async def remove(name: str) -> dict[str, Any]:
        """Cancel a job, or forget one that has ended, with its pictures."""
        kept = shelf.find(name)
        shelf.remove(kept)
        return _state(kept)

    @app.get(ROOT + "/{name}/events", response_class=StreamingResponse)
    async def events(request: Request, name: str, after: int = 0) -> StreamingResponse:
        """Tell what happens to a job; `Last-Event-ID`, or `after`, is the last event that the client knows."""
        chunks = _told(shelf.find(name), last_seen(request.headers, after), shelf)
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"cache-control": "no-store"})

    @app.get(ROOT + "/{name}/images/{index}", response_class=Response)
    async def image(name: str, index: int) -> Response:
        """Return a picture."""
        kept = shelf.find(name)
        picture = shelf.picture(kept, index)
        form = kept.form
        data = await asyncio.to_thread(picture.encoded, FORMATS[form.output_format], quality=form.compression)
        return Response(data, media_type=f"image/{form.output_format}", headers={"cache-control": "private"})

    @app.get(ROOT + "/{name}/previews/{index}", response_class=Response)
    async def preview(name: str, index: int) -> Response:
        """Return the newest preview of a picture, a pixel for each latent."""
        found = progress_of(shelf.find(name).job)
        newest = found[index].preview if 0 <= index < len(found) else None
        if newest is None:
            raise ApiError(404, f"there is no preview of picture {index}; ask for previews", "not_drawn")
        return Response(_png(newest), media_type="image/png", headers={"cache-control": "no-store"})


async def _handed_in(request: Request, models: Models, desk: Desk, shelf: Shelf) -> Kept:
    """Hand a job in, unless it is a repeat."""
    body = await request.body()
    require_json(request)
    claim = Claim.of(request, hashlib.sha256(ROOT.encode() + body).hexdigest())
    fields = await asyncio.to_thread(lambda: validated(JobRequest, read_object(body)))
    order, form = await asyncio.to_thread(make_order, fields, models, desk.limits)
    taken = desk.repeated(claim)
    if taken is not None:
        await asyncio.shield(taken.submitted)
        return shelf.find(taken.claim.name)
    taken = desk.hand_in(order, claim, "jobs")
    taken.waiters += 1  # whatever becomes of this request; the shelf sees to it
    return shelf.add(taken, form, await asyncio.shield(taken.submitted))


def _state(kept: Kept) -> dict[str, Any]:
    place, job, pictures = f"{ROOT}/{kept.id}", kept.job, kept.job.pictures
    images = [
        {
            "index": image.index,
            "status": image.status,
            "step": image.step,
            "steps": image.steps,
            "seed": pictures[image.index].seed if image.index in pictures else None,
            "url": f"{place}/images/{image.index}" if image.index in pictures else None,
            "preview_url": None if image.preview is None else f"{place}/previews/{image.index}",
        }
        for image in progress_of(job)
    ]
    return {
        "id": kept.id,
        "object": "job",
        "status": kept.status,
        "created": int(kept.created),
        "model": kept.form.model,
        "size": f"{job.size[0]}x{job.size[1]}",
        "when_gone": "drop" if kept.form.drop else "keep",
        "images": images,
        "error": None if kept.refusal is None else kept.refusal.body["error"],
    }


async def _told(kept: Kept, after: int, shelf: Shelf) -> AsyncIterator[bytes]:
    yield b": listening\n\n"
    async for event in shelf.events(kept, after):
        data = await asyncio.to_thread(_data, kept, event)
        yield sse_event(event.kind, data, event.number)


def _data(kept: Kept, event: Event) -> dict[str, Any]:
    """Return what is told of an event; a picture and a preview as they are."""
    data: dict[str, Any] = {"type": event.kind, "job": kept.id}
    if event.index is not None:
        data |= {"index": event.index, "step": event.step, "steps": event.steps}
    if event.preview is not None:
        data["b64_json"] = base64.b64encode(_png(event.preview)).decode()
    if event.picture is not None:
        form = kept.form
        encoded = event.picture.encoded(FORMATS[form.output_format], quality=form.compression)
        data |= {"b64_json": base64.b64encode(encoded).decode(), "seed": event.picture.seed}
        data |= {"url": f"{ROOT}/{kept.id}/images/{event.index}", "output_format": form.output_format}
    if event.error is not None and kept.refusal is not None:
        data |= kept.refusal.body
    return data


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
