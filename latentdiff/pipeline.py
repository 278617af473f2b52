"""From prompt to pixels. Text-to-image and image-to-image differ only in what is passed in.

    pipe = Pipeline.from_pretrained()
    pipe("a red fox", seed=7).save("fox.png")

A pipeline keeps no state between calls, so threads may share one.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff import __version__
from latentdiff.checkpoints import Parts, load_pipeline
from latentdiff.diffusion import (
    Call,
    Plan,
    as_denoiser,
    classifier_free,
    draw_noise,
    guidance_scales,
    image_generator,
    make_plan,
    sample,
    start,
)
from latentdiff.diffusion.prediction import Denoise
from latentdiff.errors import InputError, suggest
from latentdiff.images import fit, from_tensor, open_image, pixel_hash, to_rgb, to_tensor, to_unit_range
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.unet import UNet2DConditionModel
from latentdiff.result import Result
from latentdiff.settings import SIZE_MULTIPLE, Settings, check_integer, check_size

__all__ = ["DTYPES", "OUTPUT_TYPES", "Pipeline", "resolve_device", "resolve_dtype"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_STRENGTH = 0.8
BATCH_SIZE = 4
MAX_SCALE = 4  # sides of up to this many times the model's own are drawn

# images (B, 3, H, W) in [-1, 1] -> what `Result.images` is; "latent" skips the autoencoder.
OUTPUT_TYPES: dict[str, Callable[[Tensor], Any]] = {
    "pil": from_tensor,
    "pt": to_unit_range,
    "np": lambda images: to_unit_range(images).permute(0, 2, 3, 1).cpu().numpy(),
    "latent": lambda latents: latents,
}

# (steps done, steps in all, newest estimate of the batch's clean latents (b, C, h, w)) -> None
Callback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, eq=False)
class _Job:
    """What all batches of a call share.

    Attributes:
        plan: the sampler's table; `scales` the guidance scale of each of its rows.
        shape: (C, h, w) of the latents.
        noise: (B, C, h, w) to start from instead of the seeds' own, or None.
        image_latents: (1, C, h, w) to start from as well, or None.
        windows: of each prompt's text states: the more of its own and the negative prompt's.
        texts: token states (n, L, D) of each text, n windows.
    """

    settings: Settings
    plan: Plan
    scales: list[float]
    shape: tuple[int, int, int]
    noise: Tensor | None
    image_latents: Tensor | None
    texts: dict[str, Tensor]
    common: dict[str, Any]
    notes: list[str]

    def windows(self, index: int) -> int:
        """Return how many text windows image `index` needs: as many as the longer of its two prompts."""
        prompt = self.settings.prompts[index // self.settings.num_images]
        return max(len(self.texts[prompt]), len(self.texts[self.settings.negative_prompt]))


class Pipeline:
    """A text-to-image model, ready to draw.

    Args:
        parts: see `latentdiff.checkpoints.load_pipeline`; they stay on the device and in the dtype they have.
    """

    def __init__(self, parts: Parts) -> None:
        if parts.unet is None:
            raise InputError("a pipeline needs a U-Net, got none; pass all parts")
        self.parts = parts
        self.unet: UNet2DConditionModel = parts.unet
        self.autoencoder = parts.autoencoder
        self.text_encoder = parts.text_encoder

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Pipeline:
        """Load a model.

        Args:
            model: folder in diffusers' layout; None for the model that comes with the package.
            device: "cpu", "cuda", "cuda:1", "mps"; None or "auto" for the fastest there is.
            dtype: "float32" (unless given), "float16" or "bfloat16".

        Raises:
            InputError: there is no such folder, device or dtype.
            ModelLoadError: the model was refused; the subclass says why.
        """
        return cls(load_pipeline(model, resolve_dtype(dtype), resolve_device(device)))

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Pipeline:
        """Move the networks to a device, cast them, or both, in place; None leaves that as it is."""
        place = self.device if device is None else resolve_device(device)
        kind = self.dtype if dtype is None else resolve_dtype(dtype)
        for network in (self.unet, self.autoencoder, self.text_encoder):
            network.to(place, kind)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in; the arithmetic between their calls is always float32."""
        return self.unet.conv_in.weight.dtype

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained at."""
        side, factor = self.unet.config.sample_size or 64, self.autoencoder.config.downsample_factor
        height, width = side if isinstance(side, tuple) else (side, side)
        return height * factor, width * factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = Settings.negative_prompt,
        image: str | os.PathLike[str] | Image.Image | None = None,
        strength: float | None = None,
        num_inference_steps: int = Settings.num_inference_steps,
        guidance_scale: float = Settings.guidance_scale,
        guidance_rescale: float = Settings.guidance_rescale,
        guidance_interval: tuple[float, float] | None = Settings.guidance_interval,
        sampler: str = Settings.sampler,
        seed: int = Settings.seed,
        num_images: int = Settings.num_images,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        progress: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> Result:
        """Draw `num_images` pictures of each prompt; image i, counted over all prompts, has seed + i.

        Args, besides those of `Settings`:
            image: a picture, or its path, to start from; it is scaled to cover the size and cut evenly. Without height
                and width the result has its shape and the model's own area. `strength` is then 0.8 unless given.
            latents: standard normal noise (B, C, h, w) to start from instead of that of the seeds.
            output_type: "pil", "pt", "np" or "latent"; see `Result.images`.
            callback: called after each step, see `Callback`; what it raises ends the call.
            progress: show a bar on stderr.
            batch_size: how many images are drawn at once at most.

        Raises:
            InputError: something that cannot be used, with what can.
        """
        if image is None and strength is not None:
            raise InputError("strength says how much of an image is drawn anew, got no image; pass image too")
        check_integer("batch_size", batch_size, 1, 1024, f"try {BATCH_SIZE}")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type {output_type!r} is unknown{suggest(str(output_type), OUTPUT_TYPES)}")
        settings = Settings(
            prompts=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            sampler=sampler,
            seed=seed,
            num_images=num_images,
            strength=1.0 if image is None else DEFAULT_STRENGTH if strength is None else strength,
            height=height,
            width=width,
        )
        return _Drawing(self, settings, image, latents).run(output_type, batch_size, callback, progress)
