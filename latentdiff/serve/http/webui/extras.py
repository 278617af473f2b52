"""Larger pictures, and what pictures say of themselves."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps

from latentdiff.encoding import encode
from latentdiff.errors import shown, suggest
from latentdiff.generation.infotext import parse_infotext
from latentdiff.generation.result import GeneratedImage
from latentdiff.images import texts_in
from latentdiff.marks import source_type_of
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.orders import Order, decoded, finished, from_base64
from latentdiff.serve.http.webui.fields import Extra, PngInfo

__all__ = ["LARGER", "enlarged", "enlarging_order", "png_info"]

# Upscalers that are no models; "None" leaves the picture as it is.
LARGER = {"None": None, "Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


def enlarging_order(request: Extra, models: Models, limits: Limits) -> Order:
    """Return the order for a picture of a model that enlarges.

    Raises:
        ApiError, InputError: there is no such model, or the picture cannot be used.
    """
    names = [name for name, pipe in models.pipes.items() if pipe.components.upscales]
    if request.upscaler_1 not in names:
        near = suggest(request.upscaler_1[:80], [*LARGER, *names])
        message = f"there is no upscaler {shown(request.upscaler_1)}{near}"
        raise ApiError(400, message, "invalid_value", "upscaler_1")
    image = _given(request, limits)
    given: dict[str, Any] = {"prompt": "", "image": image}
    if _size(request, image, limits) == (2 * image.width, 2 * image.height):
        given["scale"] = 2
    return finished(request.upscaler_1, given, models, limits)


def enlarged(
    request: Extra, drawn: GeneratedImage | None, limits: Limits, check: Callable[[Image.Image], None]
) -> dict[str, Any]:
    """Return the answer of extra-single-image.

    Args:
        request: which picture, and how large.
        drawn: the picture by a model that enlarges, of whatever size; None where it is not to be one.
        limits: of pictures.
        check: raises where a picture may not be shown; `drawn` has passed it.

    Raises:
        ApiError, InputError: the picture cannot be used, or would be too large.
        RefusedError, FilterError: it may not be shown.
    """
    given = _given(request, limits)
    size, how = _size(request, given, limits), LARGER.get(request.upscaler_1, Image.Resampling.LANCZOS)
    if drawn is not None and drawn.image.size == size:
        data = drawn.encoded()  # with what makes it again
    else:
        image = given if drawn is None else drawn.image
        source = source_type_of(image)
        if how is not None:
            cut = request.resize_mode == 1 and request.upscaling_crop
            image = ImageOps.fit(image, size, how) if cut else image.resize(size, how)
        check(image)
        data = encode(image, "PNG", None, source)
    return {"html_info": "", "image": base64.b64encode(data).decode()}


def _given(request: Extra, limits: Limits) -> Image.Image:
    return decoded(from_base64(request.image, "image"), "image", limits)


def _size(request: Extra, image: Image.Image, limits: Limits) -> tuple[int, int]:
    """Return width and height that a picture is to have."""
    width, height = image.size
    scale = request.upscaling_resize
    if request.resize_mode == 1:
        width, height, scale = request.upscaling_resize_w, request.upscaling_resize_h, 1.0
        if not request.upscaling_crop:
            scale = min(width / image.width, height / image.height)
            width, height = image.size
    limits.check("pixels", width * height * scale**2, "upscaling_resize")
    return max(1, round(width * scale)), max(1, round(height * scale))


def png_info(request: PngInfo, limits: Limits) -> dict[str, Any]:
    """Return the answer of png-info: the settings as text, whatever texts there are, and the settings apart.

    Raises:
        ApiError, InputError: that is no picture.
    """
    data = from_base64(request.image, "image")
    limits.check("image_bytes", len(data), "image")
    texts = texts_in(data, "image")
    info = texts.get("parameters", "")
    parameters = dict[str, str]()
    for name, value in parse_infotext(info).items():
        sides = SIZE.fullmatch(value)
        parameters |= {name: value} if sides is None else {f"{name}-1": sides[1], f"{name}-2": sides[2]}
    return {"info": info, "items": texts, "parameters": parameters}
