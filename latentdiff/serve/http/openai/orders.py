"""What a request to OpenAI's images API asks of the scheduler, and in which form its pictures are answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image, ImageOps

from latentdiff.errors import InputError, shown
from latentdiff.pipeline import Pipeline
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.fields import own_options, parse_size
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.openai.fields import Fields
from latentdiff.serve.http.orders import Order, Remarks, decoded, finished, fitting_size, usual_steps

__all__ = ["FORMATS", "Form", "Kind", "Upload", "make_order"]

# Quality -> how many times the steps of the model, and what it is called in answers.
QUALITIES: dict[str, tuple[float, str]] = {
    "low": (0.5, "low"),
    "auto": (1, "medium"),
    "medium": (1, "medium"),
    "standard": (1, "medium"),
    "high": (2, "high"),
    "hd": (2, "high"),
    "xhigh": (3, "xhigh"),
    "max": (4, "max"),
}
# Sizes that clients send without being asked; a model that cannot draw one draws its own area in that shape.
SIZES = {"256x256", "512x512", "1024x1024", "1536x1024", "1024x1536", "1792x1024", "1024x1792"}
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}

Kind = Literal["generation", "edit", "variation"]


@dataclass(frozen=True)
class Upload:
    """An uploaded file.

    Attributes:
        part: of the form, which it was.
        data: its bytes.
    """

    part: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Form:
    """How a request is answered.

    Attributes:
        model: that draws it.
        response_format, stream, partial_images, background, output_format: as in the request, with their defaults.
        compression: quality of JPEG and WebP.
        quality: as answers call it.
        remarks: on the request.
    """

    model: str
    response_format: str
    stream: bool
    partial_images: int
    background: str
    output_format: str
    compression: int
    quality: str
    remarks: Remarks


def make_order(
    kind: Kind, fields: Fields, ignored: list[str], uploads: list[Upload], models: Models, limits: Limits
) -> tuple[Order, Form]:
    """Check a request as far as that needs no model to run.

    Raises:
        ApiError, InputError: something that cannot be used, or is too much.
    """
    if kind != "variation" and "prompt" not in fields.model_fields_set:
        raise ApiError(400, "prompt must be a text, which may be empty, got none", "missing_parameter", "prompt")
    model, pipe = models.find(fields.model)
    options, remarks = own_options(fields), Remarks(ignored=[*ignored])
    if fields.model is not None and fields.model != model:
        remarks.mapped.append(f"model={fields.model}->{model}")
    quality = fields.quality or "auto"
    if QUALITIES[quality][0] != 1 and not options.keys() & {"num_inference_steps", "timesteps", "sigmas"}:
        options["num_inference_steps"] = max(1, round(usual_steps(pipe) * QUALITIES[quality][0]))
    if kind != "generation":
        options |= _pictures(uploads, fields.model == "dall-e-2", limits)
    if kind == "variation":
        options.setdefault("guidance_scale", 1.0)  # there is no prompt to be guided by
    _set_size(options, fields.size, pipe, remarks)
    options |= {"prompt": fields.prompt, "num_images": 1 if fields.n is None else fields.n}
    previews = (fields.partial_images or 0) if fields.stream else 0
    order = finished(model, options, models, limits, extensions=fields, previews=previews)
    return order, _form(fields, model, remarks, transparent=_has_alpha(options, pipe))


def _form(fields: Fields, model: str, remarks: Remarks, transparent: bool) -> Form:
    output_format, background = fields.output_format or "png", fields.background or "auto"
    if background == "transparent" and output_format == "jpeg":
        raise ApiError(400, "a JPEG has no transparency; ask for png or webp", "invalid_value", "background")
    useless = {
        "output_compression": output_format == "png" and fields.output_compression is not None,
        "background": background == "transparent" and not transparent,
        "partial_images": fields.partial_images is not None and not fields.stream,
    }
    remarks.ignored.extend(name for name, found in useless.items() if found)
    return Form(
        model=model,
        response_format=fields.response_format or "b64_json",
        stream=bool(fields.stream),
        partial_images=fields.partial_images or 0,
        background=background,
        output_format=output_format,
        compression=100 if fields.output_compression is None else fields.output_compression,
        quality=QUALITIES[fields.quality or "auto"][1],
        remarks=remarks,
    )


def _set_size(options: dict[str, Any], size: str | None, pipe: Pipeline, remarks: Remarks) -> None:
    asked = parse_size(size)
    if asked is None or pipe.components.upscales:
        return
    taken = fitting_size(asked, pipe) if size in SIZES else asked
    if taken != asked:
        remarks.mapped.append(f"size={size}->{taken[0]}x{taken[1]}")
    options["width"], options["height"] = taken


def _has_alpha(options: dict[str, Any], pipe: Pipeline) -> bool:
    """Return whether something of a given picture is transparent, and stays so."""
    image = options.get("image")
    kept = pipe.components.upscales or options.get("mask") is not None
    return image is not None and kept and image.getchannel("A").getextrema()[0] < 255


def _pictures(uploads: list[Upload], erased: bool, limits: Limits) -> dict[str, Any]:
    """Return image and mask of uploads.

    Args:
        erased: where there is no mask, what is transparent in the image is drawn.
    """
    images = [one for one in uploads if one.part != "mask"]
    masks = [one for one in uploads if one.part == "mask"]
    if not images:
        raise ApiError(400, "image must be a picture, got none; upload one", "missing_image", "image")
    limits.check("images", len(images), "image")
    limits.check("images", len(masks), "mask")
    image = decoded(images[0].data, "image", limits)
    found: dict[str, Any] = {"image": image}
    if masks:
        found["mask"] = _mask(decoded(masks[0].data, "mask", limits), image)
    elif erased and image.getchannel("A").getextrema()[0] == 0:  # type: ignore[index]  # one band
        found["mask"] = "alpha"
    return found


def _mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Return a mask that is white where one of OpenAI's is transparent."""
    if mask.size != image.size:
        got = f"{mask.width}x{mask.height}"
        raise InputError(f"mask must have the size of the image, {image.width}x{image.height}, got {got}; scale it")
    white = ImageOps.invert(mask.getchannel("A"))
    if white.getextrema() == (0, 0):
        raise InputError(f"mask must be transparent where something is drawn, got {shown('opaque')}; erase that part")
    return white
