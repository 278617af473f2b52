"""Answers in OpenAI's form: pictures as base64 or links, all at once or as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from pydantic import BaseModel

from latentdiff.generation.inputs import hires_size
from latentdiff.generation.result import GeneratedImage
from latentdiff.images import to_rgb
from latentdiff.serve.http.errors import api_error
from latentdiff.serve.http.orders import FORMATS, Kind, Order
from latentdiff.serve.jobs import Event, ServedJob

__all__ = ["ErrorAnswer", "ImagesAnswer", "ModelAnswer", "ModelList", "answer", "server_sent", "sse_event"]

EVENTS: dict[Kind, str] = {"generation": "image_generation", "edit": "image_edit", "variation": "image_edit"}
Linked = Callable[[bytes, str], str]
"""(bytes of a file, output format) -> its address."""


class InputTokens(BaseModel):
    """What a request was made of."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens: those of the prompt, and of pictures the places of their latents."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class ImageAnswer(BaseModel):
    """A picture, with the seed that makes it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesAnswer(BaseModel):
    """All pictures of a request."""

    created: int
    data: list[ImageAnswer]
    background: str
    output_format: str
    quality: str
    size: str
    usage: Usage
    model: str
    notes: list[str]


class ModelAnswer(BaseModel):
    """A model."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models."""

    object: str
    data: list[ModelAnswer]


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error."""

    error: ErrorDetails


async def answer(order: Order, job: ServedJob, linked: Linked) -> dict[str, Any]:
    """Wait for the pictures of a job and return the answer.

    Raises:
        LatentDiffError: there are none; see `ServedJob.result`.
    """
    pictures = await _pictures(job)
    shown = [_shown(order, picture) for picture in pictures]
    encoded = await asyncio.to_thread(lambda: [_encoded(order, picture) for picture in shown])
    if order.response_format == "url":
        data = [{"url": linked(one, order.output_format)} for one in encoded]
    else:
        data = [{"b64_json": base64.b64encode(one).decode()} for one in encoded]
    return {
        "created": int(time.time()),
        "data": [{**one, "seed": picture.seed} for one, picture in zip(data, shown)],
        **_described(order, shown[0].image),
        "usage": _usage(job, shown),
        "model": order.model,
        "notes": list(dict.fromkeys(note for picture in shown for note in picture.notes)),
    }


async def server_sent(kind: Kind, order: Order, job: ServedJob) -> AsyncIterator[bytes]:
    """Yield the events of a job: first an empty one when it has been let in, at last its pictures, or an error.

    Raises:
        LatentDiffError: it failed before it was let in.
    """
    opened, previews = False, dict[int, int]()
    async for event in job.stream():
        if event.error is not None:
            if not opened:
                raise event.error
            yield sse_event("error", api_error(event.error).body)
            return
        if not opened:
            opened = True
            yield b": drawing\n\n"
        if event.preview is not None and event.index is not None:
            number = previews.get(event.index, 0)
            previews[event.index] = number + 1
            if number < order.partial_images:
                yield sse_event(*await asyncio.to_thread(_partial, kind, order, job, event, number))
        if event.picture is not None:
            yield sse_event(*await asyncio.to_thread(_completed, kind, order, job, event.picture, event.index))


async def _pictures(job: ServedJob) -> list[GeneratedImage]:
    found = dict[int, GeneratedImage]()
    async for event in job.stream():
        if event.error is not None:
            raise event.error
        if event.picture is not None and event.index is not None:
            found[event.index] = event.picture
    return [found[index] for index in sorted(found)]


def _partial(kind: Kind, order: Order, job: ServedJob, event: Event, number: int) -> tuple[str, dict[str, Any]]:
    preview = event.preview
    assert preview is not None
    image = preview.resize(_final_size(job), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[order.output_format])
    name = f"{EVENTS[kind]}.partial_image"
    return name, {
        "type": name,
        "b64_json": base64.b64encode(buffer.getvalue()).decode(),
        "partial_image_index": number,
        "created_at": int(time.time()),
        **_described(order, image),
        "image_index": event.index,
        "step": event.step,
        "steps": event.steps,
    }


def _completed(
    kind: Kind, order: Order, job: ServedJob, picture: GeneratedImage, index: int | None
) -> tuple[str, dict[str, Any]]:
    shown = _shown(order, picture)
    name = f"{EVENTS[kind]}.completed"
    return name, {
        "type": name,
        "b64_json": base64.b64encode(_encoded(order, shown)).decode(),
        "created_at": int(time.time()),
        **_described(order, shown.image),
        "usage": _usage(job, [shown]),
        "image_index": index,
        "seed": picture.seed,
        "model": order.model,
    }


def sse_event(name: str, data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _shown(order: Order, picture: GeneratedImage) -> GeneratedImage:
    """Return a picture without transparency, where that was asked for."""
    if picture.image.mode == "RGBA" and (order.background == "opaque" or order.output_format == "jpeg"):
        return replace(picture, image=to_rgb(picture.image))
    return picture


def _encoded(order: Order, picture: GeneratedImage) -> bytes:
    return picture.encoded(FORMATS[order.output_format], quality=order.compression)


def _described(order: Order, image: Image.Image) -> dict[str, str]:
    return {
        "background": "transparent" if image.mode == "RGBA" else "opaque",
        "output_format": order.output_format,
        "quality": order.quality,
        "size": f"{image.width}x{image.height}",
    }


def _usage(job: ServedJob, pictures: Sequence[GeneratedImage]) -> dict[str, Any]:
    """Return the tokens of a prompt and of pictures, of which a latent is one."""
    place = job.request.components.autoencoder.config.downsample_factor**2
    given = job.request.image
    seen = 0 if given.pixels is None else given.pixels.shape[-2] * given.pixels.shape[-1] // place
    text = pictures[0].token_count
    drawn = sum(one.image.width * one.image.height // place for one in pictures)
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"image_tokens": seen, "text_tokens": text},
        "output_tokens": drawn,
        "total_tokens": text + seen + drawn,
    }


def _final_size(job: ServedJob) -> tuple[int, int]:
    """Return width and height of the pictures of a job."""
    request = job.request
    if request.image.size is not None:
        return request.image.size
    factor = request.components.autoencoder.config.downsample_factor
    size = (request.image.height, request.image.width)
    height, width = hires_size(request.settings, size, factor) if request.settings.hires > 1 else size
    return width, height
