"""Which part of a picture is drawn anew, and how what is drawn meets what stays.

A mask is a picture that is white where something is drawn, a box, or the transparency of the picture itself. It is
black or white; soft edges come from `feather`, or from a picture that is transparent in part, over what is drawn then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import InputError
from latentdiff.generation.request import check_integer
from latentdiff.images import fit, open_rgba, pixel_hash, to_rgb, to_rgba, to_tensor

__all__ = ["ALPHA", "Edit", "MaskLike", "Painted", "make_edit", "open_mask", "open_picture"]

ALPHA = "alpha"  # stands for the transparency of the picture
HALF = 128  # of 255; what is at least as white is drawn
COLOURFUL = 64  # of 255; how far apart red, green and blue may be in a picture of black and white

MaskLike = str | os.PathLike[str] | Image.Image | Sequence[int]
"""A picture or its path, "alpha", or left, top, right and bottom of a box in pixels of the image."""


@dataclass(frozen=True)
class Painted:
    """A mask as it was given.

    Attributes:
        white: mode "L", of the size of the picture; shades of grey only where the picture is transparent in part.
        given: what a record keeps of it.
    """

    white: Image.Image
    given: dict[str, Any]


@dataclass(frozen=True)
class Edit:
    """Which pixels of a canvas are drawn anew, on the CPU.

    Attributes:
        mask: (1, 1, H, W), 1 where something is drawn, 0 where the picture stays.
        share: (1, 1, H, W) in [0, 1], how much of each pixel of the result is what was drawn: 0 outside the mask, but
            where the picture is transparent in part.
        kept: (1, 3, H, W) in [-1, 1], the rest of each pixel: the picture as it was given.
        alpha: opacity of the result, mode "L"; None where all of it is opaque.
    """

    mask: Tensor
    share: Tensor
    kept: Tensor
    alpha: Image.Image | None


def open_picture(given: object, name: str) -> Image.Image | None:
    """Return a picture that was passed in as upright sRGB with opacity (mode "RGBA"), None for None.

    Raises:
        InputError: it is no still picture, or cannot be read.
    """
    if given is None:
        return None
    if isinstance(given, Image.Image):
        if getattr(given, "is_animated", False) and given.format != "MPO":  # whose first picture is the photograph
            raise InputError(f"{name} must be one still picture, got an animation; pass one frame of it")
        return to_rgba(given)
    if isinstance(given, (str, os.PathLike)):
        return open_rgba(given)
    raise InputError(f"{name} must be a PIL image or a path, got {type(given).__name__}; convert it first")


def open_mask(given: Any, picture: Image.Image) -> Painted:
    """Return a mask that was passed in.

    Args:
        given: see `MaskLike`.
        picture: mode "RGBA", which it is for.

    Raises:
        InputError: it has another size, colours or transparent parts, or leaves nothing to draw or nothing to keep.
    """
    if isinstance(given, str) and given == ALPHA:
        white = ImageOps.invert(picture.getchannel("A"))
        painted = Painted(white, {"alpha": True, "hash": pixel_hash(white)})
    elif isinstance(given, (tuple, list)):
        painted = _box(given, picture.size)
    else:
        painted = _painting(given, picture.size)
    low, high = painted.white.getextrema()
    if high < HALF:  # type: ignore[operator]  # one band
        if "alpha" in painted.given:
            raise InputError("the image is opaque everywhere, so mask alpha draws nothing; erase what is to be drawn")
        raise InputError("the mask is black everywhere, so nothing would be drawn; paint white what is to be")
    if low >= HALF:  # type: ignore[operator]
        raise InputError("the mask is white everywhere, so nothing of the image is kept; leave image and mask out")
    return painted


def _box(given: Sequence[int], size: tuple[int, int]) -> Painted:
    remedy = f"try (0, 0, {max(1, size[0] // 2)}, {size[1]})"
    if len(given) != 4:
        raise InputError(f"a mask's box must be left, top, right and bottom, got {given!s:.80}; {remedy}")
    limits = (*size, *size)
    left, top, right, bottom = (check_integer("a mask's box", v, 0, limit, remedy) for v, limit in zip(given, limits))
    if left >= right or top >= bottom:
        raise InputError(f"a mask's box must have left < right and top < bottom, got {given!s:.80}; {remedy}")
    white = Image.new("L", size)
    white.paste(255, (left, top, right, bottom))
    return Painted(white, {"box": [left, top, right, bottom]})


def _painting(given: Any, size: tuple[int, int]) -> Painted:
    painted = open_picture(given, "mask")
    assert painted is not None
    if painted.size != size:
        sizes = [f"{width}x{height}" for width, height in (size, painted.size)]
        raise InputError(f"the mask must have the size of the image, {sizes[0]}, got {sizes[1]}; scale it first")
    if painted.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]  # one band
        raise InputError("the mask must be opaque, got transparent parts; lay it on black or white first")
    red, green, blue = painted.convert("RGB").split()
    apart = [ImageChops.difference(one, green).getextrema()[1] for one in (red, blue)]
    if max(apart) > COLOURFUL:  # type: ignore[type-var, operator]
        raise InputError(
            "the mask must be black and white, got colours; paint white what is to be drawn, black the rest"
        )
    white = painted.convert("L").point([0] * HALF + [255] * (256 - HALF))
    path = None if isinstance(given, Image.Image) else os.fspath(given)
    return Painted(white, {"path": path, "hash": pixel_hash(to_rgb(painted))})


def make_edit(
    picture: Image.Image, painted: Painted | None, size: tuple[int, int], sides: tuple[int, int, int, int], feather: int
) -> Edit:
    """Return what is drawn of a picture, scaled and cut to a size, and of what is around it.

    Args:
        picture: mode "RGBA".
        painted: the mask; None where only what is around is drawn.
        size: width and height in pixels.
        sides: pixels that are drawn left, above, right and below.
        feather: over how many pixels of what is drawn it passes into the picture.

    Raises:
        InputError: at that size nothing is left of the mask, or of what is around it.
    """
    left, top, right, bottom = sides
    around = (left, right, top, bottom)
    share, opacity = torch.zeros(1, 1, *reversed(size)), _shades(fit(picture.getchannel("A"), *size))
    kept, erased = to_tensor([fit(picture.convert("RGB"), *size)]), painted is not None and "alpha" in painted.given
    if painted is not None:
        share = _shades(fit(painted.white, *size))
    if erased:
        _, nearest = _distances(opacity == 0)
        kept = kept[:, :, nearest[0], nearest[1]]  # what is transparent has no colour that anyone has seen
    else:
        share = (share >= HALF / 255).float()
    if painted is not None and (share >= HALF / 255).float().mean() in (0, 1):
        what = f"something to draw and to keep at {size[0]}x{size[1]} pixels"
        raise InputError(f"the mask must have {what}, to which the image is scaled, got all of one; paint it larger")
    share, kept = F.pad(share, around, value=1.0), F.pad(kept, around, mode="replicate")
    mask = (share >= HALF / 255).float()
    if feather:
        distances, _ = _distances(mask > 0)
        share = share * torch.where(mask > 0, (distances / (feather + 1)).clamp(max=1), 1.0)
    if erased:
        return Edit(mask, share, kept, None)
    opacity = torch.lerp(F.pad(opacity, around, value=1.0), torch.ones_like(share), share)
    alpha = Image.fromarray(opacity[0, 0].mul(255).round().to(torch.uint8).numpy())
    return Edit(mask, share, kept, None if alpha.getextrema()[0] == 255 else alpha)


def _shades(image: Image.Image) -> Tensor:
    """Return a picture of mode "L" as (1, 1, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy())[None, None].float().div(255)


def _distances(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each pixel (1, 1, H, W) is from the nearest outside, and the place of that, (2, H, W)."""
    from scipy.ndimage import distance_transform_edt

    distances, nearest = distance_transform_edt(inside[0, 0].numpy(), return_indices=True)
    return torch.from_numpy(distances)[None, None].float(), torch.from_numpy(nearest).long()
