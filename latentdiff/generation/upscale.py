"""Plan upscaling: windows, memory estimate, colour correction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.checkpoints import Components
from latentdiff.devices import memory_of
from latentdiff.engine.memory_estimate import enlarging_bytes
from latentdiff.engine.tiled_denoising import Windows, make_windows
from latentdiff.errors import InputError

__all__ = ["UpscalePlan", "corrected", "plan_upscale", "reduced"]

# Pixels of the small picture. What differs from it in most of a square of this side is a colour, all else a detail or
# noise; and the standard deviation of a blur that leaves no steps between squares.
COLOUR_SQUARE, COLOUR_BLUR = 9, 1.5
BACK_PROJECTIONS = 3
AT_ONCE = 4  # times the area that the model was trained at, up to which a map is one window


@dataclass(frozen=True)
class UpscalePlan:
    """How a picture is enlarged.

    Attributes:
        windows: of the latents.
        size: width and height of what is drawn, in pixels.
        need: about how many bytes of memory it takes, the model included.
    """

    windows: Windows
    size: tuple[int, int]
    need: int

    def __str__(self) -> str:
        windows, count = self.windows, len(self.windows)
        what = "one window" if count == 1 else f"{count} overlapping windows of {windows.wide}x{windows.tall} latents"
        return f"{self.size[0]}x{self.size[1]} pixels in {what}, about {self.need / 2**20:,.0f} MB of memory"


def plan_upscale(components: Components, size: tuple[int, int], device: torch.device, images: int = 1) -> UpscalePlan:
    """Return how a picture is enlarged.

    Args:
        components: of a model that enlarges.
        size: width and height of the small picture.
        device: where the networks run.
        images: how many are drawn at once.

    Raises:
        InputError: it takes more memory than there is.
    """
    unet, factor, side = (
        components.unet,
        components.autoencoder.config.downsample_factor,
        components.unet.config.sample_size or 64,
    )
    native = side if isinstance(side, tuple) else (side, side)
    width, height = size
    whole = height * width <= AT_ONCE * native[0] * native[1]
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    windows = make_windows(height, width, (height, width) if whole else (native[0], native[-1]), multiple)
    networks = [unet, components.autoencoder, components.text_encoder, components.text_encoder_2]
    held = [network for network in networks if network is not None]
    plan = UpscalePlan(
        windows,
        (width * factor, height * factor),
        enlarging_bytes(held, unet, components.autoencoder, windows, 2 * images),
    )
    memory = memory_of(device)
    if plan.need > memory:
        raise InputError(f"the picture would be {plan}, and there are {memory / 2**20:,.0f} MB; pass a smaller one")
    return plan


def reduced(images: Tensor, height: int, width: int) -> Tensor:
    """Return images (B, 3, H, W) made smaller by Lanczos' filter."""
    if images.shape[2:] == (height, width):
        return images
    planes = [Image.fromarray(plane.numpy()) for plane in images.cpu().flatten(0, 1)]  # each (H, W) float32
    small = np.stack([np.asarray(plane.resize((width, height), Image.Resampling.LANCZOS)) for plane in planes])
    return torch.from_numpy(small).unflatten(0, tuple(images.shape[:2])).to(images.device)


def corrected(images: Tensor, small: Tensor, correction: str) -> Tensor:
    """Return enlarged pictures with colours, or all that it says, of the small one that they were drawn from.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        small: (1, 3, h, w) in [-1, 1].
        correction: see `Settings`.

    Source: Irani and Peleg 1991, "Improving resolution by image registration", section 3 (back-projection), iterated
    for "full". For "colour" its low frequencies alone, as in the colour correction of Wang et al. 2023, arXiv
    2305.07015, section 3.4, but by a median, so that noise and compression of the small picture do not come back.
    """
    for _ in range({"none": 0, "colour": 1, "full": BACK_PROJECTIONS}[correction]):
        missing = small - reduced(images, *small.shape[2:])  # (B, 3, h, w)
        if correction == "colour":
            missing = _colours(missing)
        images = images + F.interpolate(missing, images.shape[2:], mode="bicubic")
    return images


def _colours(images: Tensor) -> Tensor:
    from scipy.ndimage import gaussian_filter, median_filter

    colours = median_filter(images.cpu().numpy(), COLOUR_SQUARE, axes=(2, 3), mode="nearest")
    return torch.from_numpy(gaussian_filter(colours, COLOUR_BLUR, axes=(2, 3), mode="nearest")).to(images.device)
