"""Signature and documentation of `Pipeline.__call__`, from where the options are declared."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from latentdiff.generation.request import Settings

__all__ = ["document"]


def document(method: Any) -> None:
    """Give `Pipeline.__call__` the signature and documentation of all options, from where they are declared."""
    signature = inspect.signature(method)
    *own, _ = signature.parameters.values()
    declared = [item for item in fields(Settings) if "option" in item.metadata]
    added = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
        for item in declared
    ]
    method.__signature__ = signature.replace(parameters=[*own, *added])
    lines = [f"    {item.name}: {item.metadata['option'].help}." for item in declared]
    method.__doc__ = CALL_DOCUMENTATION.format(options="\n".join(lines))


CALL_DOCUMENTATION = """Generate `num_images` images of each prompt; image i, counted over all prompts, has seed + i.

Args:
    prompt: one text or several; empty for images of no text in particular.
    image: initial image, or its path: a picture, or uint8 array (H, W, 3). It is scaled to cover the size and cropped
        evenly; without height and width the result has its shape and the model's own area. For a model that upscales,
        the small picture, of any size and shape; where it is transparent, so is the result.
    mask: part of the image to generate (inpainting): a picture of its size, or a path of one, white where something is
        generated; "alpha" for where the image is transparent; or left, top, right and bottom of a box. All other pixels
        are kept, bit for bit, and so is the size of the image, without height and width, where its sides are
        multiples of 8 within the model's limit. A model trained for it (9 input channels) sees what is kept; with any
        other it is put into every step.
    sampler: its name, or any scheduler object of diffusers, whose images cannot be replayed.
    latents: standard normal noise (B, C, h, w) to start from instead of that of the seeds.
    output_type: "pil", "pt", "np" or "latent"; see `Result.images`.
    callback: called after each step, see `Callback`; what it raises ends the call.
    progress: show a bar on stderr.
    batch_size: how many images are sampled at once at most.

Options, each with a default of its own or of the model:
{options}

Raises:
    InputError: something that cannot be used, with what can.
"""
