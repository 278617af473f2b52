"""What models are given that draw from a picture, made of real ones: a hole to fill in, a small picture to enlarge."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor

from latentdiff.checkpoints import Components
from latentdiff.corruptions.degradation import degrade
from latentdiff.corruptions.masks import draw_mask
from latentdiff.errors import InputError
from latentdiff.images import from_tensor

__all__ = ["TASKS", "own_task", "spoilt"]

TASKS = ("inpaint", "upscale", "upscale_degraded")


def own_task(components: Components) -> str | None:
    """Return which of `TASKS` a model was made for; None for one that draws from texts alone."""
    if components.inpaints:
        return "inpaint"
    return "upscale" if components.upscales else None


def spoilt(task: str, image: Tensor, factor: int, seed: tuple[int, int]) -> Mapping[str, Image.Image]:
    """Return what is left of a picture, as arguments of a call that is to give the whole picture back.

    Args:
        task: "inpaint": a mask, white where it is filled in, as `corruptions.masks` draws them for training;
            "upscale": made small by Lanczos' filter; "upscale_degraded": as `corruptions.degradation` does at full
            strength.
        image: (3, H, W) in [-1, 1].
        factor: how much smaller the picture is made, along each side.
        seed: all chance is from it.

    Raises:
        InputError: the sides are not multiples of the factor.
    """
    picture, rng = from_tensor(image[None])[0], np.random.default_rng(seed)
    if task == "inpaint":
        return {"image": picture, "mask": Image.fromarray(draw_mask(rng, picture.height, picture.width, full=0.0))}
    if picture.width % factor or picture.height % factor:
        raise InputError(
            f"pictures must be multiples of {factor} pixels wide and high, got {picture.width}x{picture.height}; "
            "try another height and width"
        )
    if task == "upscale":
        size = (picture.width // factor, picture.height // factor)
        return {"image": picture.resize(size, Image.Resampling.LANCZOS)}
    return {"image": Image.fromarray(degrade(np.asarray(picture), factor, rng, 1.0))}
