"""What a call draws on: the size of the result, the picture to start from, and which part of it is drawn anew."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import InputError
from latentdiff.images import fit, open_image, pixel_hash, to_rgb, to_tensor, to_unit_range
from latentdiff.settings import SIZE_MULTIPLE, Settings, check_size

__all__ = ["Canvas", "enlarged_canvas", "make_canvas"]

MAX_SCALE = 4  # sides of up to this many times the model's own are drawn


@dataclass(frozen=True)
class Canvas:
    """The canvas of a call, on the CPU.

    Attributes:
        height, width: of the result in pixels.
        pixels: (1, 3, H, W) in [-1, 1], the picture to start from (smaller where it is to be enlarged), or None.
        mask: (1, 1, H, W) in [0, 1], 1 where the picture is drawn anew, 0 where it stays; None for everywhere.
        given: what a record keeps of picture and mask: paths and hashes.
    """

    height: int
    width: int
    pixels: Tensor | None
    mask: Tensor | None
    given: dict[str, Any]


def make_canvas(
    settings: Settings, image: Any, mask: Any, native: tuple[int, int], factor: int, *, opaque: bool = False
) -> Canvas:
    """Open what was passed in, and scale and cut it to the size of the result.

    Args:
        settings: of the call.
        image, mask: pictures or paths, or None.
        native: height and width, in pixels, that the model was trained at.
        factor: pixels per latent along each side.
        opaque: refuse an image with transparent parts.

    Raises:
        InputError: a size, a picture or a mask that cannot be used.
    """
    picture, painted = _open(image, "image", opaque), _open(mask, "mask")
    multiple = math.lcm(SIZE_MULTIPLE, factor)
    height, width = _size(settings, picture, native, multiple)
    left, top, right, bottom = settings.outpaint or (0, 0, 0, 0)
    result = (height + top + bottom, width + left + right)
    for name, side, limit in zip(("height", "width"), result, native):
        check_size(name, side, multiple, limit * MAX_SCALE)
    given = {"image": _trace(image, picture), "mask": _trace(mask, painted)}
    if picture is None:
        for what, value in (("a mask", painted), ("outpaint", settings.outpaint)):
            if value is not None:
                raise InputError(f"{what} says which part of an image is drawn anew, got no image; pass an image too")
        return Canvas(*result, None, None, given)
    pixels = to_tensor([fit(picture, width, height)])  # (1, 3, H, W)
    drawn = None if painted is None else _mask(painted, picture, (width, height))
    if settings.outpaint is not None:
        if drawn is not None:
            raise InputError("outpaint makes its own mask, got a mask besides; leave one of them out")
        sides = (left, right, top, bottom)
        pixels = F.pad(pixels, sides, mode="replicate")
        drawn = F.pad(torch.zeros(1, 1, height, width), sides, value=1.0)
    return Canvas(*result, pixels, drawn, given)


def enlarged_canvas(settings: Settings, image: Any, mask: Any, native: tuple[int, int], factor: int) -> Canvas:
    """Return the canvas of a model that enlarges a picture: `pixels` (1, 3, H / factor, W / factor) are that picture.

    Args:
        settings: of the call.
        image, mask: picture or path; no mask.
        native: height and width, in pixels, that the model was trained to draw.
        factor: how much larger the result is along each side.

    Raises:
        InputError: there is no picture, or something is asked for that such a model cannot do.
    """
    picture = _open(image, "image")
    if picture is None:
        raise InputError(f"this model draws a picture {factor} times as large, got no image; pass an image")
    sides = {"height": picture.height * factor, "width": picture.width * factor}
    for (name, side), limit in zip(sides.items(), native):
        multiple = math.lcm(SIZE_MULTIPLE, factor) // factor
        check_size(f"the {name} of the image", side // factor, multiple, limit * MAX_SCALE // factor)
    odd = {
        "a mask": mask is not None,
        "outpaint": settings.outpaint is not None,
        "strength below 1": settings.strength < 1,
        f"height other than {sides['height']}": settings.height not in (None, sides["height"]),
        f"width other than {sides['width']}": settings.width not in (None, sides["width"]),
    }
    for what in (name for name, given in odd.items() if given):
        raise InputError(f"this model draws a picture {factor} times as large, got {what}; leave it out")
    pixels, given = to_tensor([picture]), {"image": _trace(image, picture), "mask": None}
    return Canvas(sides["height"], sides["width"], pixels, None, given)


def _size(settings: Settings, picture: Image.Image | None, native: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return height and width in pixels: as asked for, else the shape of the picture at the model's own area."""
    height, width = native
    if picture is not None and settings.height is None and settings.width is None:
        scale = math.sqrt(native[0] * native[1] / (picture.width * picture.height))
        sides = (picture.height * scale, picture.width * scale)
        limits = (native[0] * MAX_SCALE, native[1] * MAX_SCALE)
        height, width = (min(max(round(side / multiple), 1) * multiple, limit) for side, limit in zip(sides, limits))
    return settings.height or height, settings.width or width


def _mask(mask: Image.Image, picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return a mask as (1, 1, H, W) in [0, 1], scaled and cut as the image is."""
    if mask.size != picture.size:
        sizes = [f"{one.width}x{one.height}" for one in (picture, mask)]
        raise InputError(f"the mask must have the size of the image, {sizes[0]}, got {sizes[1]}; scale it first")
    low, high = mask.convert("L").getextrema()
    if high < 128:  # type: ignore[operator]  # one band
        raise InputError("the mask is black everywhere, so nothing would be drawn; paint white what is to be")
    if low > 127:  # type: ignore[operator]
        raise InputError("the mask is white everywhere, so nothing of the image is kept; leave image and mask out")
    return to_unit_range(to_tensor([fit(mask, *size)])).mean(dim=1, keepdim=True)


def _trace(given: Any, picture: Image.Image | None) -> dict[str, Any] | None:
    """Return what a record keeps of a picture that was passed in: its path, where it has one, and the hash of it."""
    if picture is None:
        return None
    return {"path": None if isinstance(given, Image.Image) else os.fspath(given), "hash": pixel_hash(picture)}


def _open(image: object, name: str, opaque: bool = False) -> Image.Image | None:
    if image is None:
        return None
    if isinstance(image, Image.Image):
        return to_rgb(image, opaque=opaque)
    if isinstance(image, (str, os.PathLike)):
        return open_image(image, opaque=opaque)
    raise InputError(f"{name} must be a PIL image or a path, got {type(image).__name__}; convert it first")
