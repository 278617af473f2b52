"""From what stands on the page to an order, by the same fields and checks as every other door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageChops
from pydantic import create_model

from latentdiff.errors import InputError
from latentdiff.generation.options import options_of
from latentdiff.generation.request import Settings
from latentdiff.serve.http.fields import own_fields, own_options, parse_size, validated
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.orders import Order, decoded, finished
from latentdiff.serve.page.controls import texts_of
from latentdiff.serve.page.files import read, reduced
from latentdiff.serve.page.modes import MODES, fitting_model

__all__ = ["AUTOMATIC", "page_order"]

AUTOMATIC = "automatic"  # the model that is best for what is drawn
PREVIEWS = 12  # of each picture
PageRequest = create_model("PageRequest", **own_fields())


def page_order(values: Mapping[str, Any], models: Models, limits: Limits) -> Order:
    """Return what is to be drawn, checked.

    Args:
        values: of the controls, by name.
        models: that are served.
        limits: of requests.

    Raises:
        ApiError, InputError: something that cannot be used, or is too much.
    """
    mode = str(values["mode"])
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got another; choose one")
    prompt = str(values.get("prompt") or "").strip()
    if not prompt and mode != "upscale":
        raise InputError("a prompt says what to draw, got none; write one")
    options = own_options(validated(PageRequest, texts_of(values, mode)))
    options |= _pictures(mode, values, limits)
    size = parse_size(str(values.get("size") or "auto").strip()) if mode in ("text", "image") else None
    if size is not None:
        options["width"], options["height"] = size
    count = 1 if mode == "upscale" else values.get("num_images") or 1
    options |= {"prompt": prompt, "num_images": options_of(Settings)["num_images"].check("num_images", count)}
    model = _model(mode, str(values.get("model") or AUTOMATIC), models)
    return finished(model, options, models, limits, n="the number of pictures", previews=PREVIEWS)


def _model(mode: str, chosen: str, models: Models) -> str:
    if chosen != AUTOMATIC:
        return models.find(chosen)[0]
    found = fitting_model(mode, models.pipes)
    if found is None:
        names = ", ".join(models.pipes)
        add = "embedded-upscale" if mode == "upscale" else "embedded"
        raise InputError(f"{MODES[mode].label.lower()} needs a model for it, got {names}; serve {add} besides")
    return found


def _pictures(mode: str, values: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Return image and mask."""
    name = MODES[mode].picture
    if name is None:
        return {}
    given = values.get(name)
    painted = given if isinstance(given, dict) else {}
    path = painted.get("background") if name == "painted" else given
    if not path:
        layers = " to paint on" if name == "painted" else ""
        raise InputError(f"{MODES[mode].label.lower()} needs a picture{layers}, got none; choose one first")
    image = decoded(read(str(path), "the picture"), "image", limits)
    if name != "painted":
        return {"image": image}
    image = reduced(image, painted.get("times", 1))
    mask = Image.new("L", image.size, 0)
    for layer in painted.get("layers") or []:
        strokes = decoded(read(str(layer), "the mask"), "mask", limits).getchannel("A")
        mask = ImageChops.lighter(mask, strokes.resize(image.size))
    mask = mask.point(lambda alpha: 255 if alpha >= 128 else 0)
    if mask.getextrema() == (0, 0):
        raise InputError("a mask says what is drawn anew, got none; paint over that part of the picture")
    return {"image": image, "mask": mask}
