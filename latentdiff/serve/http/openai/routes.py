"""The routes of OpenAI's images API."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile

from latentdiff.serve.http.bodies import json_body, require_json, schema_of
from latentdiff.serve.http.desk import Claim, Desk
from latentdiff.serve.http.errors import ApiError, api_error
from latentdiff.serve.http.guard import FILES
from latentdiff.serve.http.links import Links
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.openai.answers import ImagesAnswer, ModelAnswer, ModelList, answer, server_sent
from latentdiff.serve.http.openai.fields import Fields, GenerationRequest, read_form, read_json
from latentdiff.serve.http.openai.orders import Kind, Upload, make_order
from latentdiff.serve.http.sse import sse_event

__all__ = ["add_routes"]

UPLOADS = ("image", "image[]", "mask")
MOST_FIELDS, MOST_FILES = 100, 18


def add_routes(app: FastAPI, models: Models, desk: Desk, links: Links) -> None:
    """Add the routes to an application."""
    _add_models(app, models)
    _add_images(app, models, desk, links)


def _add_models(app: FastAPI, models: Models) -> None:
    @app.get("/v1/models", response_model=ModelList)
    async def list_models() -> dict[str, Any]:
        """Return the models that are served."""
        return {"object": "list", "data": [models.described(name) for name in models.pipes]}

    @app.get("/v1/models/{name:path}", response_model=ModelAnswer)
    async def one_model(name: str) -> dict[str, Any]:
        """Return one model, or that which stands for one of OpenAI's."""
        return models.described(name)


def _add_images(app: FastAPI, models: Models, desk: Desk, links: Links) -> None:
    async def drawn(
        kind: Kind, request: Request, fields: Fields, ignored: list[str], uploads: list[Upload], digest: str
    ) -> Response:
        order, form = await asyncio.to_thread(make_order, kind, fields, ignored, uploads, models, desk.limits)
        base = str(request.base_url).rstrip("/")
        async with AsyncExitStack() as stack:
            job = await stack.enter_async_context(desk.served(order, Claim.of(request, digest), request, "openai"))
            if not form.stream:
                body = await answer(form, job, lambda data, kind: base + links.add(data, kind))
                return JSONResponse(body, headers=form.remarks.headers)
            events = server_sent(kind, form, job)
            opening = await anext(events)
            chunks = _to_the_end(opening, events, stack.pop_all())
            return StreamingResponse(chunks, media_type="text/event-stream", headers=form.remarks.headers)

    @app.post("/v1/images/generations", response_model=ImagesAnswer, openapi_extra=json_body(GenerationRequest))
    async def generations(request: Request) -> Response:
        """Draw pictures of a prompt."""
        body = await request.body()
        require_json(request)
        return await drawn(
            "generation", request, *read_json(body), [], hashlib.sha256(b"generation" + body).hexdigest()
        )

    @app.post("/v1/images/edits", response_model=ImagesAnswer, openapi_extra=_form_body("image", "mask"))
    async def edits(request: Request) -> Response:
        """Draw a picture anew, or the part of it where the mask is transparent."""
        values, uploads = await _read_multipart(request)
        return await drawn("edit", request, *read_form(values), uploads, _digest("edit", values, uploads))

    @app.post("/v1/images/variations", response_model=ImagesAnswer, openapi_extra=_form_body("image"))
    async def variations(request: Request) -> Response:
        """Draw pictures like another."""
        values, uploads = await _read_multipart(request)
        return await drawn("variation", request, *read_form(values), uploads, _digest("variation", values, uploads))

    @app.get(FILES + "{name}", response_class=Response)
    async def file(name: str, expires: str = "", signature: str = "") -> Response:
        """Return the picture of a link."""
        kept = links.find(name, expires, signature)
        headers = {"cache-control": "private, immutable", "x-content-type-options": "nosniff"}
        return Response(kept.data, media_type=kept.media_type, headers=headers)


async def _to_the_end(opening: bytes, events: AsyncIterator[bytes], stack: AsyncExitStack) -> AsyncIterator[bytes]:
    async with stack:
        yield opening
        try:
            async for event in events:
                yield event
        except Exception as error:  # such as settings that a JPEG cannot hold
            yield sse_event("error", api_error(error).body)


async def _read_multipart(request: Request) -> tuple[dict[str, str], list[Upload]]:
    """Return the fields and the files of a form.

    Raises:
        ApiError: it is none, or a picture is no file.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "the body must be multipart/form-data, got another", "wrong_content_type")
    values, uploads = dict[str, str](), list[Upload]()
    async with AsyncExitStack() as stack:
        try:
            form = await stack.enter_async_context(request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS))
        except ValueError:  # of a charset that decodes nothing, and of older parsers
            raise ApiError(400, "the form cannot be read; send it in UTF-8", "invalid_body") from None
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in UPLOADS:
                    raise ApiError(400, f"there is no file {name}; upload image and mask", "unknown_parameter", name)
                uploads.append(Upload(name, await value.read()))
            elif name in UPLOADS:
                raise ApiError(400, f"{name} must be an uploaded file; no address is ever fetched", "no_file", name)
            elif name in values:
                raise ApiError(400, f"{name} must be given once, got several", "invalid_value", name)
            else:
                values[name] = value
    return values, uploads


def _digest(kind: Kind, values: dict[str, str], uploads: list[Upload]) -> str:
    """Return what is the same of two requests with the same content, whatever marks its parts."""
    files = [(one.part, hashlib.sha256(one.data).hexdigest()) for one in uploads]
    return hashlib.sha256(json.dumps([kind, sorted(values.items()), files]).encode()).hexdigest()


def _form_body(*files: str) -> dict[str, Any]:
    schema = schema_of(GenerationRequest)
    uploads = {name: {"type": "string", "contentMediaType": "application/octet-stream"} for name in files}
    properties = {**schema["properties"], **uploads}
    schema = {**schema, "title": "PictureRequest", "properties": properties, "required": ["image"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
