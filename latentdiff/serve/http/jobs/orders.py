"""What a request for a job asks of the scheduler, and what is done with its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, create_model

from latentdiff.generation.masks import ALPHA
from latentdiff.serve.http.fields import Extensions, own_fields, own_options, parse_size
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.orders import Order, decoded, finished, from_base64

__all__ = ["FORMATS", "Form", "JobFields", "JobRequest", "make_order"]

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


class JobFields(Extensions):
    """The fields of a job; null is as good as left out."""

    prompt: str = Field("", description="What to draw.")
    model: str | None = Field(None, description="A name of GET /v1/models.")
    n: int = Field(1, ge=1, description="How many pictures.")
    size: str | None = Field(None, description="`auto`, or width x height as in `64x64`.")
    image: str | None = Field(None, description="A picture to start from, in base64.")
    mask: str | list[int] | None = Field(
        None, description="A picture in base64, white where something is drawn; `alpha`; or left, top, right, bottom."
    )
    previews: int = Field(0, ge=0, le=100, description="Of each picture.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of JPEG and WebP.")
    when_gone: Literal["keep", "drop"] = Field(
        "keep", description="Whether it is drawn and kept, or cancelled, when nobody asks for it any more."
    )


JobRequest: type[JobFields] = create_model("JobRequest", __base__=JobFields, **own_fields())


@dataclass(frozen=True)
class Form:
    """What is done with the pictures of a job.

    Attributes:
        model: that draws it.
        output_format, compression: of its pictures.
        drop: cancel it when nobody asks for it any more.
    """

    model: str
    output_format: str
    compression: int
    drop: bool


def make_order(request: JobFields, models: Models, limits: Limits) -> tuple[Order, Form]:
    """Check a request as far as that needs no model to run.

    Raises:
        ApiError, InputError: something that cannot be used, or is too much.
    """
    model, _ = models.find(request.model)
    options: dict[str, Any] = {**own_options(request), "prompt": request.prompt, "num_images": request.n}
    size = parse_size(request.size)
    if size is not None:
        options["width"], options["height"] = size
    if request.image is not None:
        options["image"] = decoded(from_base64(request.image, "image"), "image", limits)
    if isinstance(request.mask, str) and request.mask != ALPHA:
        options["mask"] = decoded(from_base64(request.mask, "mask"), "mask", limits)
    elif request.mask is not None:
        options["mask"] = request.mask
    order = finished(model, options, models, limits, extensions=request, previews=request.previews)
    return order, Form(model, request.output_format, request.output_compression, request.when_gone == "drop")
