"""What a request of the web UI's API asks of the scheduler."""

from __future__ import annotations

import secrets
from typing import Any

from PIL import Image, ImageOps

from latentdiff.generation.masks import HALF, with_filled_background
from latentdiff.pipeline import Pipeline
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.orders import (
    MAX_RANDOM_SEED,
    Order,
    Remarks,
    decoded,
    finished,
    fitting_size,
    from_base64,
)
from latentdiff.serve.http.webui.fields import Img2Img, Txt2Img, ignored
from latentdiff.serve.http.webui.names import own_sampler
from latentdiff.serve.http.webui.options import Options

__all__ = ["make_order"]

PREVIEWS = 10  # of each picture, for GET progress
USUAL_STRENGTH, USUAL_BLUR = 0.75, 4  # the web UI's own defaults of img2img
LATENT = "Latent"  # how the names of upscalers begin that work as ours does


def make_order(request: Txt2Img, options: Options, models: Models, limits: Limits) -> tuple[Order, Options, Remarks]:
    """Check a request as far as that needs no model to run.

    Args:
        request: from txt2img or img2img.
        options: of the client.
        models: that are served.
        limits: of requests.

    Returns:
        The order, the options that were in force, and remarks on the request.

    Raises:
        ApiError, InputError: something that cannot be used, or is too much.
    """
    options, left = options.changed(request.override_settings, models)
    remarks = Remarks(ignored=[*ignored(request), *(f"override_settings.{name}" for name in left)])
    pipe = models.pipes[options.model]
    given = _plain_options(request, options, remarks)
    if isinstance(request, Img2Img):
        given |= _pictures(request, limits, remarks)
    _set_size(given, request, pipe, remarks)
    if request.enable_hr and not isinstance(request, Img2Img):
        given |= _second_pass(request, remarks)
    order = finished(options.model, given, models, limits, n="batch_size", previews=PREVIEWS)
    return order, options, remarks


def _plain_options(request: Txt2Img, options: Options, remarks: Remarks) -> dict[str, Any]:
    sampler = own_sampler(request.sampler_name or request.sampler_index, request.scheduler)
    if request.scheduler is not None and request.scheduler.lower() == "uniform":
        remarks.mapped.append(f"scheduler={request.scheduler}->Automatic")
    given: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_images": request.batch_size * request.n_iter,
        "num_inference_steps": request.steps,
        "guidance_scale": request.cfg_scale,
        "sampler": sampler,
        "seed": None if request.seed == -1 else request.seed,
        "clip_skip": (request.clip_skip or options.clip_skip) - 1 or None,
    }
    if request.subseed_strength:
        seed = secrets.randbelow(MAX_RANDOM_SEED) if request.subseed == -1 else request.subseed
        given |= {"variation_strength": request.subseed_strength, "variation_seed": seed}
    if request.eta is not None and sampler is not None and sampler.startswith("ddim"):
        given["eta"] = request.eta
    elif request.eta not in (None, 0, 1):
        remarks.ignored.append("eta")
    return {name: value for name, value in given.items() if value is not None}


def _set_size(given: dict[str, Any], request: Txt2Img, pipe: Pipeline, remarks: Remarks) -> None:
    if pipe.components.upscales or (request.width is None and request.height is None):
        return
    height, width = pipe.native_size
    asked = (request.width or width, request.height or height)
    taken = fitting_size(asked, pipe)
    if taken != asked:
        remarks.mapped.append(f"size={asked[0]}x{asked[1]}->{taken[0]}x{taken[1]}")
    given["width"], given["height"] = taken
    image = given.get("image")
    other_shape = image is not None and image.width * taken[1] != image.height * taken[0]
    if other_shape and isinstance(request, Img2Img) and request.resize_mode != 1:  # what stands over is cut off
        remarks.mapped.append(f"resize_mode={request.resize_mode}->1")


def _second_pass(request: Txt2Img, remarks: Remarks) -> dict[str, Any]:
    """Return the options of a second pass at a larger size."""
    scale = request.hr_scale
    if request.hr_resize_x and request.width:
        scale = request.hr_resize_x / request.width
    elif request.hr_resize_y and request.height:
        scale = request.hr_resize_y / request.height
    if request.hr_upscaler is not None and not request.hr_upscaler.startswith(LATENT):
        remarks.mapped.append(f"hr_upscaler={request.hr_upscaler}->Latent (bicubic)")
    strength = {} if request.denoising_strength is None else {"hires_strength": request.denoising_strength}
    return {"hires": scale, **strength} if scale != 1 else {}


def _pictures(request: Img2Img, limits: Limits, remarks: Remarks) -> dict[str, Any]:
    """Return the picture, its mask, and what they are done with."""
    if not request.init_images:
        raise ApiError(400, "init_images must have a picture, got none; send one", "missing_image", "init_images")
    limits.check("images", len(request.init_images), "init_images")
    image = decoded(from_base64(request.init_images[0], "init_images"), "init_images", limits)
    strength = USUAL_STRENGTH if request.denoising_strength is None else request.denoising_strength
    found: dict[str, Any] = {"image": image, "strength": strength}
    if request.mask is None:
        return found
    found["mask"] = mask = _mask(request, image, limits)
    blurs = [one for one in (request.mask_blur, request.mask_blur_x, request.mask_blur_y) if one is not None]
    found["feather"] = max(blurs, default=USUAL_BLUR)
    if request.inpainting_fill == 0:
        found["image"] = _filled(image, mask)
    elif request.inpainting_fill > 1:
        remarks.mapped.append(f"inpainting_fill={request.inpainting_fill}->denoising_strength=1")
        found["strength"] = 1.0
    return found


def _mask(request: Img2Img, image: Image.Image, limits: Limits) -> Image.Image:
    """Return a mask of black and white, of the size of the image; of one with transparency what is opaque is white."""
    opened = decoded(from_base64(request.mask, "mask"), "mask", limits)
    band = opened.getchannel("A")
    if band.getextrema()[0] == 255:  # type: ignore[index]  # one band
        band = opened.convert("L")
    mask = band.resize(image.size, Image.Resampling.BILINEAR).point([0] * HALF + [255] * (256 - HALF))
    return ImageOps.invert(mask) if request.inpainting_mask_invert else mask


def _filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return a picture whose masked part has the colours nearest to it, and whose transparency is as it was."""
    if mask.getextrema()[0] == 255:  # type: ignore[index]  # one band: nothing is left to take colours from
        return image
    cut = image.copy()
    cut.putalpha(ImageOps.invert(mask))
    filled = with_filled_background(cut)
    filled.putalpha(image.getchannel("A"))
    return filled
