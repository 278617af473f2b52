"""Answers in OpenAI's form: pictures as base64 or links, all at once or as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from pydantic import BaseModel

from latentdiff.generation.result import GeneratedImage
from latentdiff.images import to_rgb
from latentdiff.serve.http.errors import api_error
from latentdiff.serve.http.openai.orders import FORMATS, Form, Kind
from latentdiff.serve.http.sse import sse_event
from latentdiff.serve.jobs import Event, ServedJob

__all__ = ["ImagesAnswer", "ModelAnswer", "ModelList", "answer", "server_sent"]

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


async def answer(form: Form, job: ServedJob, linked: Linked) -> dict[str, Any]:
    """Wait for the pictures of a job and return the answer.

    Raises:
        LatentDiffError: there are none; see `ServedJob.result`.
    """
    pictures = await job.drawn()
    shown = [_shown(form, picture) for picture in pictures]
    encoded = await asyncio.to_thread(lambda: [_encoded(form, picture) for picture in shown])
    if form.response_format == "url":
        data = [{"url": linked(one, form.output_format)} for one in encoded]
    else:
        data = [{"b64_json": base64.b64encode(one).decode()} for one in encoded]
    return {
        "created": int(time.time()),
        "data": [{**one, "seed": picture.seed} for one, picture in zip(data, shown)],
        **_described(form, shown[0].image),
        "usage": _usage(job, shown),
        "model": form.model,
        "notes": list(dict.fromkeys(note for picture in shown for note in picture.notes)),
    }


async def server_sent(kind: Kind, form: Form, job: ServedJob) -> AsyncIterator[bytes]:
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
            if number < form.partial_images:
                yield sse_event(*await asyncio.to_thread(_partial, kind, form, job, event, number))
        if event.picture is not None:
            yield sse_event(*await asyncio.to_thread(_completed, kind, form, job, event.picture, event.index))


def _partial(kind: Kind, form: Form, job: ServedJob, event: Event, number: int) -> tuple[str, dict[str, Any]]:
    preview = event.preview
    assert preview is not None
    image = preview.resize(job.size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[form.output_format])
    name = f"{EVENTS[kind]}.partial_image"
    return name, {
        "type": name,
        "b64_json": base64.b64encode(buffer.getvalue()).decode(),
        "partial_image_index": number,
        "created_at": int(time.time()),
        **_described(form, image),
        "image_index": event.index,
        "step": event.step,
        "steps": event.steps,
    }


def _completed(
    kind: Kind, form: Form, job: ServedJob, picture: GeneratedImage, index: int | None
) -> tuple[str, dict[str, Any]]:
    shown = _shown(form, picture)
    name = f"{EVENTS[kind]}.completed"
    return name, {
        "type": name,
        "b64_json": base64.b64encode(_encoded(form, shown)).decode(),
        "created_at": int(time.time()),
        **_described(form, shown.image),
        "usage": _usage(job, [shown]),
        "image_index": index,
        "seed": picture.seed,
        "model": form.model,
    }


def _shown(form: Form, picture: GeneratedImage) -> GeneratedImage:
    """Return a picture without transparency, where that was asked for."""
    if picture.image.mode == "RGBA" and (form.background == "opaque" or form.output_format == "jpeg"):
        return replace(picture, image=to_rgb(picture.image))
    return picture


def _encoded(form: Form, picture: GeneratedImage) -> bytes:
    return picture.encoded(FORMATS[form.output_format], quality=form.compression)


def _described(form: Form, image: Image.Image) -> dict[str, str]:
    return {
        "background": "transparent" if image.mode == "RGBA" else "opaque",
        "output_format": form.output_format,
        "quality": form.quality,
        "size": f"{image.width}x{image.height}",
    }


def _usage(job: ServedJob, pictures: Sequence[GeneratedImage]) -> dict[str, Any]:
    """Return the tokens of a prompt and of pictures, of which a latent is one."""
    place = job.pixels_per_latent
    seen, text = job.given_pixels // place, pictures[0].token_count
    drawn = sum(one.image.width * one.image.height // place for one in pictures)
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"image_tokens": seen, "text_tokens": text},
        "output_tokens": drawn,
        "total_tokens": text + seen + drawn,
    }
