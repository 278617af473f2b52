"""Pixels to latents, and latents to the pixels of the result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.checkpoints import Components
from latentdiff.checkpoints.components import Autoencoder
from latentdiff.engine.execution import Execution
from latentdiff.engine.tiled_decoding import ENLARGED_MAP, LARGE_MAP, decode
from latentdiff.errors import InputError
from latentdiff.generation.inputs import PreparedImage
from latentdiff.generation.upscale import corrected, reduced
from latentdiff.images import from_tensor, to_unit_range

__all__ = ["OUTPUT_TYPES", "decode_latents", "encode_image", "with_opacity"]

# images (B, 3, H, W) in [-1, 1] -> what `Result.images` is; "latent" skips the autoencoder.
OUTPUT_TYPES: dict[str, Callable[[Tensor], Any]] = {
    "pil": from_tensor,
    "pt": to_unit_range,
    "np": lambda images: to_unit_range(images).permute(0, 2, 3, 1).cpu().numpy(),
    "latent": lambda latents: latents,
}


def encode_image(components: Components, execution: Execution, pixels: Tensor, notes: list[str]) -> Tensor:
    """Return the scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]: the mode of the encoder's posterior."""
    latents = _finite(components, execution, lambda model, x: model.encode(x).mode(), pixels, notes)
    return latents * components.autoencoder.config.scaling_factor


def decode_latents(
    components: Components,
    execution: Execution,
    latents: Tensor,
    image: PreparedImage,
    correction: str,
    notes: list[str],
) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] of scaled latents, with the pixels of the input where those are kept.

    Args:
        latents: (B, C, h, w).
        image: whose mask says what is kept, and which an upscaled result is corrected by.
        correction: see `Settings`.
        notes: gets a line where the autoencoder overflowed.
    """
    large = ENLARGED_MAP if components.upscales else LARGE_MAP

    def run(model: Autoencoder, x: Tensor) -> Tensor:
        own = model is components.autoencoder  # not a copy of it in float32
        return decode(model, x, execution.tile_size, large, execution.engine.decode(model) if own else None)

    scaled = latents / components.autoencoder.config.scaling_factor
    images = _finite(components, execution, run, scaled, notes)
    if components.upscales and image.pixels is not None:
        images = corrected(images.clamp(-1, 1), image.pixels.to(images.device), correction)
    if image.mask is not None:
        return torch.lerp(image.mask.kept.to(images), images.clamp(-1, 1), image.mask.alpha.to(images))
    return images if image.size is None else reduced(images.clamp(-1, 1), image.size[1], image.size[0])


def with_opacity(picture: Image.Image, image: PreparedImage) -> Image.Image:
    """Return a picture as transparent as the input is where it is kept or upscaled."""
    opacity = image.opacity if image.mask is None else image.mask.opacity
    if opacity is not None:
        picture.putalpha(opacity)
    return picture


def _finite(
    components: Components,
    execution: Execution,
    run: Callable[[Autoencoder, Tensor], Tensor],
    x: Tensor,
    notes: list[str],
) -> Tensor:
    """Run the autoencoder, in float32 where its config asks for that or its own precision overflows."""
    autoencoder, dtype = components.autoencoder, execution.dtype
    upcast = dtype == torch.float16 and components.upcasts
    with execution.onload(autoencoder):
        if not upcast:
            output = run(autoencoder, x.to(dtype)).float()
            if torch.isfinite(output).all():
                return output
        output = run(copy.deepcopy(autoencoder).float(), x.float())
    if not torch.isfinite(output).all():
        raise InputError("the autoencoder overflowed even in float32; use a lower guidance_scale or another model")
    if upcast:
        return output
    notes.append(f"the autoencoder overflowed in {dtype} and was run again in float32")
    return output
