"""Read inpainting masks and blend generated pixels with kept ones.

A mask is a picture that is white where something is generated, a box, or the transparency of the picture itself. Shades
of grey, `feather`, and parts of the picture that are partly transparent make soft edges.
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
from latentdiff.generation.options import check_integer
from latentdiff.generation.result import recorded_name
from latentdiff.images import fit, from_array, open_rgba, pixel_hash, to_rgb, to_rgba, to_tensor

__all__ = ["ALPHA", "MaskImage", "MaskLike", "PreparedMask", "hard_mask", "open_mask", "open_picture", "prepare_mask"]

ALPHA = "alpha"  # stands for the transparency of the picture
HALF = 128  # of 255; what is at least as white is drawn
COLOURFUL = 64  # of 255; how far apart red, green and blue may be in a picture of black and white

MaskLike = str | os.PathLike[str] | Image.Image | Sequence[int]
"""A picture or its path, "alpha", or left, top, right and bottom of a box in pixels of the image."""


@dataclass(frozen=True)
class MaskImage:
    """A mask as it was given.

    Attributes:
        white: mode "L", of the size of the picture; shades of grey only where the picture is transparent in part.
        given: what a record keeps of it.
    """

    white: Image.Image
    given: dict[str, Any]


@dataclass(frozen=True)
class PreparedMask:
    """An inpainting mask at the size of the result, and what the result is composed of, on the CPU.

    Attributes:
        mask: (1, 1, H, W), 1 where something is generated, 0 where the picture stays.
        alpha: (1, 1, H, W) in [0, 1], weight of the generated pixels in the result: 0 outside the mask, but where the
            picture is partly transparent.
        kept: (1, 3, H, W) in [-1, 1], the picture as it was given, which has the rest of the weight.
        opacity: of the result, mode "L"; None where all of it is opaque.
    """

    mask: Tensor
    alpha: Tensor
    kept: Tensor
    opacity: Image.Image | None


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
        return open_rgba(given, name)
    if isinstance(given, (np.ndarray, Tensor)):
        return to_rgba(from_array(given, name))
    raise InputError(f"{name} must be a picture, an array or a path, got {type(given).__name__}; convert it first")


def open_mask(given: object, picture: Image.Image) -> MaskImage:
    """Return a mask that was passed in.

    Args:
        given: see `MaskLike`.
        picture: mode "RGBA", which it is for.

    Raises:
        InputError: it has another size, colours or transparent parts.
    """
    if isinstance(given, str) and given == ALPHA:
        white = ImageOps.invert(picture.getchannel("A"))
        mask_image = MaskImage(white, {"alpha": True, "hash": pixel_hash(white)})
    elif isinstance(given, (tuple, list)):
        mask_image = _box(given, picture.size)
    else:
        mask_image = _painting(given, picture.size)
    if "alpha" in mask_image.given and mask_image.white.getextrema()[1] < HALF:  # type: ignore[operator]  # one band
        raise InputError("the image is opaque everywhere, so mask alpha draws nothing; erase what is to be drawn")
    return mask_image


def _box(given: Sequence[int], size: tuple[int, int]) -> MaskImage:
    remedy = f"try (0, 0, {max(1, size[0] // 2)}, {size[1]})"
    if len(given) != 4:
        raise InputError(f"a mask's box must be left, top, right and bottom, got {given!s:.80}; {remedy}")
    limits = (*size, *size)
    left, top, right, bottom = (check_integer("a mask's box", v, 0, limit, remedy) for v, limit in zip(given, limits))
    if left >= right or top >= bottom:
        raise InputError(f"a mask's box must have left < right and top < bottom, got {given!s:.80}; {remedy}")
    white = Image.new("L", size)
    white.paste(255, (left, top, right, bottom))
    return MaskImage(white, {"box": [left, top, right, bottom]})


def _painting(given: object, size: tuple[int, int]) -> MaskImage:
    mask_image = open_picture(given, "mask")
    assert mask_image is not None
    if mask_image.size != size:
        sizes = [f"{width}x{height}" for width, height in (size, mask_image.size)]
        raise InputError(f"the mask must have the size of the image, {sizes[0]}, got {sizes[1]}; scale it first")
    if mask_image.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]  # one band
        raise InputError("the mask must be opaque, got transparent parts; lay it on black or white first")
    red, green, blue = mask_image.convert("RGB").split()
    apart = [ImageChops.difference(one, green).getextrema()[1] for one in (red, blue)]
    if max(apart) > COLOURFUL:  # type: ignore[type-var, operator]
        raise InputError(
            "the mask must be black and white, got colours; paint white what is to be drawn, black the rest"
        )
    path = recorded_name(given) if isinstance(given, (str, os.PathLike)) else None
    record = {"path": path, "hash": pixel_hash(to_rgb(mask_image))}
    white = mask_image.convert("L")
    return MaskImage(white, {**record, "soft": True} if sum(white.histogram()[1:255]) else record)


def hard_mask(mask: Image.Image) -> Image.Image:
    """Return a mask of mode "RGBA" without shades of grey, as masks were read once."""
    return mask.convert("L").point([0] * HALF + [255] * (256 - HALF))


def prepare_mask(
    picture: Image.Image,
    mask_image: MaskImage | None,
    size: tuple[int, int],
    sides: tuple[int, int, int, int],
    feather: int,
) -> PreparedMask:
    """Return what is drawn of a picture, scaled and cut to a size, and of what is around it.

    Args:
        picture: mode "RGBA".
        mask_image: the mask; None where only what is around is drawn.
        size: width and height in pixels.
        sides: pixels that are drawn left, above, right and below.
        feather: over how many pixels of what is drawn it passes into the picture.

    Raises:
        InputError: at that size nothing is left of the mask, or of what is around it.
    """
    left, top, right, bottom = sides
    around = (left, right, top, bottom)
    alpha, opacity = torch.zeros(1, 1, *reversed(size)), _shades(fit(picture.getchannel("A"), *size))
    kept, erased = (
        to_tensor([fit(picture.convert("RGB"), *size)]),
        mask_image is not None and "alpha" in mask_image.given,
    )
    if mask_image is not None:
        alpha = _shades(fit(mask_image.white, *size))
    if erased:
        _, nearest = _distances(opacity == 0)
        kept = kept[:, :, nearest[0], nearest[1]]  # what is transparent has no colour that anyone has seen
    elif mask_image is None or "soft" not in mask_image.given:  # what is grey now is so from scaling
        alpha = (alpha >= HALF / 255).float()
    if mask_image is not None and _is_uniform(alpha) and mask_image.white.getextrema() not in ((0, 0), (255, 255)):
        what = f"something to draw and to keep at {size[0]}x{size[1]} pixels"
        raise InputError(f"the mask must have {what}, to which the image is scaled, got all of one; paint it larger")
    alpha, kept = F.pad(alpha, around, value=1.0), F.pad(kept, around, mode="replicate")
    mask = (alpha >= HALF / 255).float()
    if feather and not _is_uniform(alpha):
        distances, _ = _distances(mask > 0)
        alpha = alpha * torch.where(mask > 0, (distances / (feather + 1)).clamp(max=1), 1.0)
    if erased:
        return PreparedMask(mask, alpha, kept, None)
    opacity = torch.lerp(F.pad(opacity, around, value=1.0), torch.ones_like(alpha), alpha)
    band = Image.fromarray(opacity[0, 0].mul(255).round().to(torch.uint8).numpy())
    return PreparedMask(mask, alpha, kept, None if band.getextrema()[0] == 255 else band)


def with_filled_background(picture: Image.Image) -> Image.Image:
    """Return a picture of mode "RGBA" without its opacity, its transparent parts in the nearest colour there is.

    So nothing of a background comes into its edges when it is enlarged.
    """
    colours, seen = np.asarray(picture.convert("RGB")), np.asarray(picture.getchannel("A")) > 0
    if not seen.any():
        return picture.convert("RGB")
    _, (rows, columns) = _distances(torch.from_numpy(~seen)[None, None])
    return Image.fromarray(colours[rows.numpy(), columns.numpy()])


def _is_uniform(alpha: Tensor) -> bool:
    return bool((alpha >= HALF / 255).float().mean() in (0, 1))


def _shades(image: Image.Image) -> Tensor:
    """Return a picture of mode "L" as (1, 1, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy())[None, None].float().div(255)


def _distances(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each pixel (1, 1, H, W) is from the nearest outside, and the place of that, (2, H, W)."""
    from scipy.ndimage import distance_transform_edt

    distances, nearest = distance_transform_edt(inside[0, 0].numpy(), return_indices=True)
    return torch.from_numpy(distances)[None, None].float(), torch.from_numpy(nearest).long()
