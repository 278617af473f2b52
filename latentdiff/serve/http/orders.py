"""What a request asks of the scheduler, and in which form its pictures are answered."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image, ImageOps

from latentdiff.errors import InputError, shown
from latentdiff.generation.inputs import MAX_SCALE
from latentdiff.generation.options import SIZE_MULTIPLE, options_of
from latentdiff.generation.request import Settings
from latentdiff.images import decode_rgba, image_size
from latentdiff.pipeline import DEFAULT_STRENGTH, Pipeline
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.fields import Fields, own_options, parse_size
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import Models

__all__ = ["Order", "Upload", "make_order"]

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
MAX_RANDOM_SEED = 2**32  # which every client's numbers hold

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
class Order:
    """A request that can be handed in.

    Attributes:
        model, pipe: what draws it.
        options: for `Scheduler.submit`, prompt and pictures included.
        n: how many pictures.
        steps: of a picture, about.
        response_format, stream, partial_images, background, output_format: as in the request, with their defaults.
        compression: quality of JPEG and WebP.
        quality: as answers call it.
        ignored: names of fields that were ignored.
        mapped: what a field was taken for, where that is not what it says.
    """

    model: str
    pipe: Pipeline
    options: dict[str, Any]
    n: int
    steps: int
    response_format: str
    stream: bool
    partial_images: int
    background: str
    output_format: str
    compression: int
    quality: str
    ignored: tuple[str, ...]
    mapped: tuple[str, ...]

    @property
    def headers(self) -> dict[str, str]:
        """Say in the answer what was ignored, and what was taken for something else."""
        said = {"x-latentdiff-ignored": ", ".join(self.ignored), "x-latentdiff-mapped": ", ".join(self.mapped)}
        return {name: text for name, text in said.items() if text}


def make_order(
    kind: Kind, fields: Fields, ignored: list[str], uploads: list[Upload], models: Models, limits: Limits
) -> Order:
    """Check a request as far as that needs no model to run.

    Raises:
        ApiError, InputError: something that cannot be used, or is too much.
    """
    if kind != "variation" and "prompt" not in fields.model_fields_set:
        raise ApiError(400, "prompt must be a text, which may be empty, got none", "missing_parameter", "prompt")
    model, pipe = models.find(fields.model)
    options, mapped = own_options(fields), list[str]()
    if fields.model is not None and fields.model != model:
        mapped.append(f"model={fields.model}->{model}")
    n = 1 if fields.n is None else fields.n
    limits.check("n", n, "n")
    quality = fields.quality or "auto"
    steps = _set_steps(options, pipe, quality)
    if uploads:
        options |= _pictures(uploads, fields.model == "dall-e-2", limits)
    if kind == "variation":
        options.setdefault("guidance_scale", 1.0)  # there is no prompt to be guided by
    options.setdefault("seed", secrets.randbelow(MAX_RANDOM_SEED))
    _set_size(options, fields.size, pipe, mapped)
    _check_work(options, steps, pipe, limits)
    output_format, background = fields.output_format or "png", fields.background or "auto"
    ignored = [*ignored]
    if background == "transparent" and output_format == "jpeg":
        raise ApiError(400, "a JPEG has no transparency; ask for png or webp", "invalid_value", "background")
    if output_format == "png" and fields.output_compression is not None:
        ignored.append("output_compression")
    if background == "transparent" and not _has_alpha(options, pipe):
        ignored.append("background")
    if fields.partial_images is not None and not fields.stream:
        ignored.append("partial_images")
    return Order(
        model=model,
        pipe=pipe,
        options={"prompt": fields.prompt, "num_images": n, **options},
        n=n,
        steps=max(1, round(steps * _share(options))),
        response_format=fields.response_format or "b64_json",
        stream=bool(fields.stream),
        partial_images=fields.partial_images or 0,
        background=background,
        output_format=output_format,
        compression=100 if fields.output_compression is None else fields.output_compression,
        quality=QUALITIES[quality][1],
        ignored=tuple(ignored),
        mapped=tuple(mapped),
    )


def _set_steps(options: dict[str, Any], pipe: Pipeline, quality: str) -> int:
    """Set the number of steps by quality, unless it is given; return it."""
    if options.get("timesteps") is not None or options.get("sigmas") is not None:
        levels = options.get("timesteps") or options.get("sigmas")
        return len(levels) if isinstance(levels, tuple) else 1
    if "num_inference_steps" not in options and QUALITIES[quality][0] != 1:
        usual = pipe.components.defaults.get("num_inference_steps", Settings.num_inference_steps)
        options["num_inference_steps"] = max(1, round(usual * QUALITIES[quality][0]))
    usual = pipe.components.defaults.get("num_inference_steps", Settings.num_inference_steps)
    return int(options.get("num_inference_steps", usual))


def _share(options: dict[str, Any]) -> float:
    """Return which share of the steps is taken: those of an image that is changed start in between."""
    whole = options.get("image") is None or options.get("mask") is not None or "outpaint" in options
    return float(options.get("strength", 1.0 if whole else DEFAULT_STRENGTH))


def _set_size(options: dict[str, Any], size: str | None, pipe: Pipeline, mapped: list[str]) -> None:
    asked, (height, width) = parse_size(size), pipe.native_size
    if asked is None or size is None or pipe.components.upscales:
        return
    if size in SIZES and (asked[0] > width * MAX_SCALE or asked[1] > height * MAX_SCALE):
        multiple = math.lcm(SIZE_MULTIPLE, pipe.components.autoencoder.config.downsample_factor)
        scale = math.sqrt(width * height / (asked[0] * asked[1]))
        asked = tuple(max(1, round(side * scale / multiple)) * multiple for side in asked)  # type: ignore[assignment]
        mapped.append(f"size={size}->{asked[0]}x{asked[1]}")
    options["width"], options["height"] = asked


def _check_work(options: dict[str, Any], steps: int, pipe: Pipeline, limits: Limits) -> None:
    """Refuse pictures that are too large, or take too many steps."""
    for name in ("hires", "resampling"):  # which multiply both, so they must be numbers that can be used
        if name in options:
            options_of(Settings)[name].check(name, options[name])
    limits.check("steps", steps * options.get("resampling", 1), "steps")
    height, width = pipe.native_size
    width, height = options.get("width", width), options.get("height", height)
    larger, image = options.get("hires", 1.0), options.get("image")
    if pipe.components.upscales and image is not None:
        width, height = image.size
        larger = pipe.components.autoencoder.config.downsample_factor
    limits.check("pixels", width * height * larger**2, "size")


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
    image = _picture(images[0], "image", limits)
    found: dict[str, Any] = {"image": image}
    if masks:
        found["mask"] = _mask(_picture(masks[0], "mask", limits), image)
    elif erased and image.getchannel("A").getextrema()[0] == 0:  # type: ignore[index]  # one band
        found["mask"] = "alpha"
    return found


def _picture(upload: Upload, name: str, limits: Limits) -> Image.Image:
    limits.check("image_bytes", len(upload.data), name)
    width, height = image_size(upload.data, name)
    limits.check("image_pixels", width * height, name)
    image = decode_rgba(upload.data, name)
    image.info = {}  # whatever the file says of itself
    return image


def _mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Return a mask that is white where one of OpenAI's is transparent."""
    if mask.size != image.size:
        got = f"{mask.width}x{mask.height}"
        raise InputError(f"mask must have the size of the image, {image.width}x{image.height}, got {got}; scale it")
    white = ImageOps.invert(mask.getchannel("A"))
    if white.getextrema() == (0, 0):
        raise InputError(f"mask must be transparent where something is drawn, got {shown('opaque')}; erase that part")
    return white
