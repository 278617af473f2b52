"""What a call draws on: the size of the result, the picture to start from, and which part of it is drawn anew."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import InputError
from latentdiff.generation.masks import Edit, make_edit, open_mask, open_picture
from latentdiff.generation.request import SIZE_MULTIPLE, Settings, check_size
from latentdiff.generation.result import record_of
from latentdiff.images import MAX_PIXELS, fit, pixel_hash, to_rgb, to_tensor
from latentdiff.prompts import check_prompts

__all__ = ["Canvas", "enlarged_canvas", "make_canvas"]

MAX_SCALE = 4  # sides of up to this many times the model's own are drawn


@dataclass(frozen=True)
class Canvas:
    """The canvas of a call, on the CPU.

    Attributes:
        height, width: of what is drawn, in pixels.
        pixels: (1, 3, H, W) in [-1, 1], the picture to start from (smaller where it is to be enlarged), or None.
        edit: which part of the picture is drawn anew; None for all of it.
        given: what a record keeps of picture and mask: paths and hashes.
        notes: what the caller should know.
        size: width and height of the result where it was enlarged; None where it is as it was drawn.
        alpha: opacity of a picture that was enlarged, mode "L"; None where it was opaque.
    """

    height: int
    width: int
    pixels: Tensor | None
    edit: Edit | None
    given: dict[str, Any]
    notes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    alpha: Image.Image | None = None


def make_canvas(
    settings: Settings, image: Any, mask: Any, native: tuple[int, int], factor: int, *, opaque: bool = False
) -> Canvas:
    """Open what was passed in, and scale and cut it to the size of the result.

    Args:
        settings: of the call.
        image, mask: pictures or paths, or None; the mask may be any `MaskLike`.
        native: height and width, in pixels, that the model was trained at.
        factor: pixels per latent along each side.
        opaque: refuse an image with transparent parts.

    Raises:
        InputError: a size, a picture or a mask that cannot be used.
    """
    picture, multiple = open_picture(image, "image"), math.lcm(SIZE_MULTIPLE, factor)
    _check_request(settings, picture is not None, mask is not None)
    if picture is None:
        asked = (settings.height or native[0], settings.width or native[1])
        _check_sides(asked, native, multiple)
        height, width = (round(side * settings.hires / multiple) * multiple for side in asked)
        _check_sides((height, width), native, multiple, " with hires")
        size = (width, height) if settings.hires > 1 else None
        return Canvas(height, width, None, None, {"image": None, "mask": None}, size=size)
    seen = to_rgb(picture, opaque=opaque)
    if min(seen.size) < factor:
        got = f"{seen.width}x{seen.height}"
        raise InputError(f"the image must be at least {factor}x{factor} pixels, one latent, got {got}; enlarge it")
    painted = None if mask is None else open_mask(mask, picture)
    edited = painted is not None or settings.outpaint is not None
    height, width = _size(settings, seen, native, multiple, edited)
    left, top, right, bottom = sides = settings.outpaint or (0, 0, 0, 0)
    result = (height + top + bottom, width + left + right)
    _check_sides(result, native, multiple, " with outpaint" if settings.outpaint else "")
    given = {"image": _trace(image, seen), "mask": None if painted is None else painted.given}
    pixels = F.pad(to_tensor([fit(seen, width, height)]), (left, right, top, bottom), mode="replicate")  # (1, 3, H, W)
    if not edited:
        return Canvas(*result, pixels, None, given)
    notes = []
    if settings.height is None and settings.width is None and seen.size != (width, height):
        limits = f"multiples of {multiple}, at most {native[1] * MAX_SCALE}x{native[0] * MAX_SCALE}"
        scaled = f"from {seen.width}x{seen.height} to {width}x{height}"
        notes.append(f"the image was scaled {scaled} pixels; it is kept bit for bit where its sides are {limits}")
    edit = make_edit(picture, painted, (width, height), sides, settings.feather)
    return Canvas(*result, pixels, edit, given, tuple(notes))


def _check_request(settings: Settings, pictured: bool, masked: bool) -> None:
    """Raise InputError where what says which part of an image is drawn lacks the image, or says it twice or of none."""
    outpainted = settings.outpaint is not None
    if not pictured:
        check_prompts(settings.prompts)
    if settings.hires > 1 and pictured:
        raise InputError("hires draws from a prompt alone, and then larger, got an image; leave one of them out")
    if settings.scale is not None:
        raise InputError(
            "scale is for models that enlarge a picture, got another; use embedded-upscale, or leave it out"
        )
    if settings.correction != "none":
        raise InputError("correction is for models that enlarge a picture, got another; leave it out")
    for what, given in (("a mask", masked), ("outpaint", outpainted)):
        if given and not pictured:
            raise InputError(f"{what} says which part of an image is drawn anew, got no image; pass an image too")
    if outpainted and masked:
        raise InputError("outpaint makes its own mask, got a mask besides; leave one of them out")
    if settings.feather and not outpainted and not masked:
        raise InputError("feather softens the edge of what is drawn anew, got no mask and no outpaint; leave it out")


def _check_sides(sides: tuple[int, int], native: tuple[int, int], multiple: int, more: str = "") -> None:
    for name, side, limit in zip(("height", "width"), sides, native):
        check_size(name + more, side, multiple, limit * MAX_SCALE)


def enlarged_canvas(settings: Settings, image: Any, mask: Any, factor: int) -> Canvas:
    """Return the canvas of a model that enlarges a picture: `pixels` (1, 3, H / factor, W / factor) are that picture.

    Args:
        settings: of the call.
        image, mask: picture or path; no mask.
        factor: how much larger what is drawn is along each side.

    Raises:
        InputError: there is no picture, or something is asked for that such a model cannot do.
    """
    opened = open_picture(image, "image")
    if opened is None:
        raise InputError(f"this model draws a picture {factor} times as large, got no image; pass an image")
    picture, scale = to_rgb(opened), settings.scale or factor
    width, height = picture.width * scale, picture.height * scale
    odd = {
        "a mask": mask is not None,
        "outpaint": settings.outpaint is not None,
        "feather": settings.feather > 0,
        "hires": settings.hires > 1,
        "strength below 1": settings.strength < 1,
        f"scale {scale}": scale > factor,
        f"height other than {height}": settings.height not in (None, height),
        f"width other than {width}": settings.width not in (None, width),
    }
    for what in (name for name, asked in odd.items() if asked):
        raise InputError(f"this model draws a picture {factor} times as large, got {what}; leave it out")
    if picture.width * picture.height * factor**2 > MAX_PIXELS:
        most = f"{MAX_PIXELS // 2**20} megapixels"
        raise InputError(f"the picture would have more than {most}, got {picture.width}x{picture.height}; cut it first")
    alpha = opened.getchannel("A")
    given = {"image": _trace(image, picture), "mask": None}
    clear = alpha.getextrema()[0] < 255  # type: ignore[operator]  # one band
    return Canvas(
        picture.height * factor,
        picture.width * factor,
        to_tensor([picture]),
        None,
        given,
        size=(width, height),
        alpha=alpha.resize((width, height), Image.Resampling.LANCZOS) if clear else None,
    )


def _size(
    settings: Settings, picture: Image.Image, native: tuple[int, int], multiple: int, edited: bool
) -> tuple[int, int]:
    """Return height and width in pixels: as asked for, else of the picture's shape.

    A picture of which a part is kept keeps its size where that can be drawn; others get the model's own area.
    """
    height, width = native
    if settings.height is None and settings.width is None:
        limits = (native[0] * MAX_SCALE, native[1] * MAX_SCALE)
        sides = (picture.height, picture.width)
        if edited and all(side % multiple == 0 and side <= limit for side, limit in zip(sides, limits)):
            return sides
        if max(sides) > MAX_SCALE**2 * min(sides):
            longest = f"at most {MAX_SCALE**2} times as long as wide"
            raise InputError(
                f"the image must be {longest}, got {picture.width}x{picture.height}; cut it, or give height and width"
            )
        scale = math.sqrt(native[0] * native[1] / (picture.width * picture.height))
        height, width = (
            min(max(round(side * scale / multiple), 1) * multiple, limit) for side, limit in zip(sides, limits)
        )
    return settings.height or height, settings.width or width


def _trace(given: Any, picture: Image.Image) -> dict[str, Any]:
    """Return what a record keeps of a picture that was passed in: the hash of it, its path or else what made it."""
    if not isinstance(given, Image.Image):
        return {"path": os.fspath(given), "hash": pixel_hash(picture)}
    record = record_of(given)
    return {"path": None, "hash": pixel_hash(picture), **({} if record is None else {"record": record})}
