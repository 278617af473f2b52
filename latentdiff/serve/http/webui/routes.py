"""The routes of the web UI's API."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from latentdiff.errors import JobCancelledError
from latentdiff.generation.result import GeneratedImage
from latentdiff.serve.http.bodies import json_body, require_json
from latentdiff.serve.http.desk import Claim, Desk, client_of
from latentdiff.serve.http.fields import checked, read_object
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.orders import Remarks
from latentdiff.serve.http.webui.answers import PicturesAnswer, pictures_answer, progress_answer
from latentdiff.serve.http.webui.extras import LARGER, enlarged, enlarging_order, png_info
from latentdiff.serve.http.webui.fields import Extra, Img2Img, PngInfo, Txt2Img, ignored
from latentdiff.serve.http.webui.lists import list_embeddings, list_loras, list_upscalers
from latentdiff.serve.http.webui.names import list_samplers, list_schedulers
from latentdiff.serve.http.webui.options import Choices, listed_models
from latentdiff.serve.http.webui.orders import make_order
from latentdiff.serve.jobs import ServedJob

__all__ = ["add_routes"]

ROOT, DOOR = "/sdapi/v1", "webui"
Fields = TypeVar("Fields", bound=BaseModel)


def add_routes(app: FastAPI, models: Models, desk: Desk) -> None:
    """Add the routes to an application."""
    choices = Choices(models)
    _add_pictures(app, models, desk, choices)
    _add_extras(app, models, desk)
    _add_options(app, models, choices)
    _add_lists(app, models)
    _add_progress(app, desk)


def _add_pictures(app: FastAPI, models: Models, desk: Desk, choices: Choices) -> None:
    async def pictures(kind: type[Txt2Img], request: Request) -> JSONResponse:
        fields, digest = await _read(kind, request)
        client = client_of(request)
        order, options, remarks = await asyncio.to_thread(make_order, fields, choices.of(client), models, desk.limits)
        if not fields.override_settings_restore_afterwards:
            choices.keep(client, options)
        claim = Claim.of(request, digest)
        if fields.force_task_id:
            claim = replace(claim, name=fields.force_task_id)
        async with desk.served(order, claim, request, DOOR) as job:
            found = await _drawn_so_far(job)
            body = await asyncio.to_thread(pictures_answer, fields, options, found)
        return JSONResponse(body, headers=remarks.headers)

    @app.post(f"{ROOT}/txt2img", response_model=PicturesAnswer, openapi_extra=json_body(Txt2Img))
    async def txt2img(request: Request) -> JSONResponse:
        """Draw pictures of a prompt."""
        return await pictures(Txt2Img, request)

    @app.post(f"{ROOT}/img2img", response_model=PicturesAnswer, openapi_extra=json_body(Img2Img))
    async def img2img(request: Request) -> JSONResponse:
        """Draw a picture anew, or the part of it where the mask is white."""
        return await pictures(Img2Img, request)


def _add_extras(app: FastAPI, models: Models, desk: Desk) -> None:
    @app.post(f"{ROOT}/extra-single-image", openapi_extra=json_body(Extra))
    async def extra_single_image(request: Request) -> JSONResponse:
        """Enlarge a picture, by a model that is served or by interpolation."""
        fields, digest = await _read(Extra, request)
        remarks = Remarks(ignored=ignored(fields))
        if fields.upscaler_1 in LARGER:
            body = await asyncio.to_thread(enlarged, fields, None, desk.limits, desk.scheduler.check)
        else:
            order = await asyncio.to_thread(enlarging_order, fields, models, desk.limits)
            async with desk.served(order, Claim.of(request, digest), request, DOOR) as job:
                (picture,) = await job.drawn()
                body = await asyncio.to_thread(enlarged, fields, picture, desk.limits, desk.scheduler.check)
        return JSONResponse(body, headers=remarks.headers)

    @app.post(f"{ROOT}/png-info", openapi_extra=json_body(PngInfo))
    async def read_png_info(request: Request) -> dict[str, Any]:
        """Return what a picture says of itself."""
        fields, _ = await _read(PngInfo, request)
        return await asyncio.to_thread(png_info, fields, desk.limits)


def _add_options(app: FastAPI, models: Models, choices: Choices) -> None:
    @app.get(f"{ROOT}/options")
    async def options(request: Request) -> dict[str, Any]:
        """Return the options of this client."""
        return await asyncio.to_thread(choices.of(client_of(request)).shown, models)

    @app.post(f"{ROOT}/options")
    async def set_options(request: Request) -> JSONResponse:
        """Set options of this client, such as its model."""
        require_json(request)
        values, client = read_object(await request.body()), client_of(request)
        chosen, left = await asyncio.to_thread(choices.of(client).changed, values, models)
        choices.keep(client, chosen)
        return JSONResponse({}, headers=Remarks(ignored=left).headers)


def _add_lists(app: FastAPI, models: Models) -> None:
    @app.get(f"{ROOT}/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        """Return the models that are served."""
        return await asyncio.to_thread(listed_models, models)

    @app.get(f"{ROOT}/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """Return the samplers."""
        return list_samplers()

    @app.get(f"{ROOT}/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """Return the spacings of noise levels."""
        return list_schedulers()

    @app.get(f"{ROOT}/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        """Return what enlarges pictures."""
        return list_upscalers(models)

    @app.get(f"{ROOT}/latent-upscale-modes")
    async def latent_upscale_modes() -> list[dict[str, str]]:
        """Return how the second pass enlarges."""
        return [{"name": "Latent (bicubic)"}]

    @app.get(f"{ROOT}/loras")
    async def loras() -> list[dict[str, Any]]:
        """Return the LoRAs that prompts may name."""
        return await asyncio.to_thread(list_loras, models)

    @app.get(f"{ROOT}/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        """Return the learned words of the models."""
        return list_embeddings(models)

    @app.get(f"{ROOT}/sd-vae")
    @app.get(f"{ROOT}/sd-modules", include_in_schema=False)
    async def sd_vae() -> list[dict[str, str]]:
        """Return no autoencoders: each model has its own."""
        return []

    @app.get(f"{ROOT}/scripts")
    async def scripts() -> dict[str, list[str]]:
        """Return no scripts: there are none."""
        return {"txt2img": [], "img2img": []}


def _add_progress(app: FastAPI, desk: Desk) -> None:
    @app.get(f"{ROOT}/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        """Say how far the oldest job of this client is."""
        return progress_answer(desk.running(client_of(request), DOOR), not skip_current_image)

    async def interrupt(request: Request) -> dict[str, Any]:
        """Cancel the oldest job of this client; what is drawn of it is answered."""
        for taken in desk.running(client_of(request), DOOR)[:1]:
            taken.cancel()
        return {}

    for name in ("interrupt", "skip"):
        app.post(f"{ROOT}/{name}", name=name)(interrupt)


async def _drawn_so_far(job: ServedJob) -> list[GeneratedImage]:
    """Wait for the pictures of a job; of one that is cancelled, return those that are drawn."""
    try:
        return await job.drawn()
    except JobCancelledError:
        found = job.pictures
        if not found:
            raise
        return [found[index] for index in sorted(found)]


async def _read(kind: type[Fields], request: Request) -> tuple[Fields, str]:
    """Return the fields of a body, and what is the same of two requests with the same content."""
    body = await request.body()
    require_json(request)
    digest = hashlib.sha256(request.url.path.encode() + body).hexdigest()
    return await asyncio.to_thread(lambda: checked(kind, read_object(body))), digest
