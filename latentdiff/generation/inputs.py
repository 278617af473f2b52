"""Prepare the inputs of a request: the size of the result, the initial image at that size, and its mask."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import InputError
from latentdiff.generation.masks import PreparedMask, open_mask, open_picture, prepare_mask, with_filled_background
from latentdiff.generation.options import SIZE_MULTIPLE, check_size
from latentdiff.generation.request import Settings
from latentdiff.generation.result import record_of, recorded_name
from latentdiff.images import MAX_PIXELS, fit, pixel_hash, to_rgb, to_tensor
from latentdiff.marks import GENERATED, source_type_of

__all__ = ["PreparedImage", "prepare_image", "prepare_small_image"]

MAX_SCALE = 4  # sides of up to this many times the model's own are drawn


@dataclass(frozen=True)
class PreparedImage:
    """The size of the result, and the pictures to start from at that size, on the CPU.

    Attributes:
        height, width: generated, in pixels.
        pixels: (1, 3, H, W) in [-1, 1], the initial image (the small one, for a model that upscales), or None.
        mask: part of the image to generate; None for all of it.
        given: record of image and mask: names and hashes.
        notes: messages to the caller.
        size: width and height of the result of an upscaler; None where it is what was generated.
        opacity: of the result of an upscaler, mode "L"; None where the small picture was opaque.
    """

    height: int
    width: int
    pixels: Tensor | None
    mask: PreparedMask | None
    given: dict[str, Any]
    notes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    opacity: Image.Image | None = None


def prepare_image(
    settings: Settings, image: object, mask: object, native: tuple[int, int], factor: int, *, opaque: bool = False
) -> PreparedImage:
    """Open the initial image and its mask, and scale and crop them to the size of the result.

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
    if picture is None:
        asked = (settings.height or native[0], settings.width or native[1])
        _check_sides(asked, native, multiple)
        _check_sides(hires_size(settings, asked, factor), native, multiple, " with hires")
        return PreparedImage(*asked, None, None, {"image": None, "mask": None})
    seen = to_rgb(picture, opaque=opaque)
    if min(seen.size) < factor:
        got = f"{seen.width}x{seen.height}"
        raise InputError(f"the image must be at least {factor}x{factor} pixels, one latent, got {got}; enlarge it")
    mask_image = None if mask is None else open_mask(mask, picture)
    edited = mask_image is not None or settings.outpaint is not None
    height, width = _size(settings, seen, native, multiple, edited)
    left, top, right, bottom = sides = settings.outpaint or (0, 0, 0, 0)
    result = (height + top + bottom, width + left + right)
    _check_sides(result, native, multiple, " with outpaint" if settings.outpaint else "")
    given = {"image": _trace(image, picture, seen), "mask": None if mask_image is None else mask_image.given}
    pixels = F.pad(to_tensor([fit(seen, width, height)]), (left, right, top, bottom), mode="replicate")  # (1, 3, H, W)
    if not edited:
        return PreparedImage(*result, pixels, None, given)
    notes = []
    if settings.height is None and settings.width is None and seen.size != (width, height):
        limits = f"multiples of {multiple}, at most {native[1] * MAX_SCALE}x{native[0] * MAX_SCALE}"
        scaled = f"from {seen.width}x{seen.height} to {width}x{height}"
        notes.append(f"the image was scaled {scaled} pixels; it is kept bit for bit where its sides are {limits}")
    edit = prepare_mask(picture, mask_image, (width, height), sides, settings.feather)
    return PreparedImage(*result, pixels, edit, given, tuple(notes))


def hires_size(settings: Settings, size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return height and width, in pixels, of the second pass over images of a size; `factor` pixels are a latent."""
    multiple = math.lcm(SIZE_MULTIPLE, factor)
    height, width = (round(side * settings.hires / multiple) * multiple for side in size)
    return height, width


def _check_sides(sides: tuple[int, int], native: tuple[int, int], multiple: int, more: str = "") -> None:
    for name, side, limit in zip(("height", "width"), sides, native):
        check_size(name + more, side, multiple, limit * MAX_SCALE)


def prepare_small_image(settings: Settings, image: object, mask: object, factor: int) -> PreparedImage:
    """Open the small picture of a model that upscales one: `pixels` are (1, 3, H / factor, W / factor).

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
    opacity = opened.getchannel("A")
    given = {"image": _trace(image, opened, picture), "mask": None}
    clear = opacity.getextrema()[0] < 255  # type: ignore[operator]  # one band
    return PreparedImage(
        picture.height * factor,
        picture.width * factor,
        to_tensor([with_filled_background(opened) if clear else picture]),
        None,
        given,
        size=(width, height),
        opacity=opacity.resize((width, height), Image.Resampling.LANCZOS) if clear else None,
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


def _trace(given: object, opened: Image.Image, picture: Image.Image) -> dict[str, Any]:
    """Return what a record keeps of a picture that was passed in: the hash of it, its path or else what made it.

    Args:
        given: as it was passed in.
        opened: what it is, with its mark.
        picture: what the result is made from, without transparency.
    """
    trace: dict[str, Any] = {"path": None, "hash": pixel_hash(picture)}
    if isinstance(given, (str, os.PathLike)):
        trace["path"] = recorded_name(given)
    elif isinstance(given, Image.Image) and (record := record_of(given)) is not None:
        trace["record"] = record
    return trace | ({"generated": True} if source_type_of(opened) == GENERATED else {})
