"""Prepare what the images of a request share: its texts, its pictures and the plan of the sampler.

`prepare` makes one `Stage`, or two where a request is generated in two passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.checkpoints import Components
from latentdiff.diffusion import Plan, Scheduler, SchedulerPlan, make_plan
from latentdiff.diffusion.tuned import TUNED
from latentdiff.engine.execution import Execution
from latentdiff.engine.tiled_denoising import Windows
from latentdiff.errors import InputError, shown
from latentdiff.generation.decode import encode_image
from latentdiff.generation.inputs import PreparedImage, hires_size
from latentdiff.generation.request import Settings
from latentdiff.generation.text import Conditioning, TextCache, encode_texts

__all__ = ["Job", "Stage", "prepare"]


@dataclass(frozen=True)
class Job:
    """A request with the model and the inputs it is for.

    Attributes:
        image: prepared for the first pass, where there are two.
        noise: standard normal noise (N, C, h, w) in place of that of the seeds, or None.
        scheduler: of diffusers, in place of the sampler of the settings, or None.
        texts: those of earlier requests, which need not be encoded again.
    """

    components: Components
    execution: Execution
    settings: Settings
    image: PreparedImage
    noise: Tensor | None = None
    scheduler: Scheduler | None = None
    texts: TextCache = field(default_factory=TextCache)


@dataclass(frozen=True)
class Stage:
    """One sampling pass over the images of a request.

    Attributes:
        settings: whose height and width are those of the pass.
        image: size and pixels of the result.
        shape: (C, h, w) of the latents of an image.
        plan: rows of the sampler.
        strength: how much of the initial latents is re-noised.
        conditioning: texts and sizes.
        image_latents: (1, C, h, w) of the initial image, or None.
        mask: (1, 1, H, W), 1 where something is generated, or None.
        concat: (1, 1 + C, h, w), mask and masked image latents of an inpainting model, or None.
        small: (1, 3, h, w), small picture of an upscaling model, or None.
        windows: of tiled denoising; None for the whole map at once.
    """

    settings: Settings
    image: PreparedImage
    shape: tuple[int, int, int]
    plan: Plan | SchedulerPlan
    strength: float
    conditioning: Conditioning
    image_latents: Tensor | None = None
    mask: Tensor | None = None
    concat: Tensor | None = None
    small: Tensor | None = None
    windows: Windows | None = None


def prepare(job: Job, notes: list[str]) -> list[Stage]:
    """Return the sampling passes of a request; nothing is encoded or opened after that."""
    components, settings, image = job.components, job.settings, job.image
    with job.execution.onload(components.text_encoder, components.text_encoder_2):
        texts = encode_texts(components, settings, job.texts, job.execution.engine)
    stages = [prepare_stage(job, texts, image, settings.strength, notes)]
    _check_noise(job.noise, (settings.count, *stages[0].shape))
    if settings.hires > 1 and image.pixels is None and not components.upscales:
        height, width = hires_size(
            settings, (image.height, image.width), components.autoencoder.config.downsample_factor
        )
        large = replace(image, height=height, width=width, size=(width, height))
        stages.append(prepare_stage(job, texts, large, settings.hires_strength, notes))
    return stages


def prepare_stage(job: Job, texts: Mapping[str, Any], image: PreparedImage, strength: float, notes: list[str]) -> Stage:
    """Return one sampling pass."""
    components, execution, device = job.components, job.execution, job.execution.device
    factor = components.autoencoder.config.downsample_factor
    settings = _settled(job.settings, components, image)
    shape = (components.autoencoder.config.latent_channels, image.height // factor, image.width // factor)
    stage = Stage(
        settings=settings,
        image=image,
        shape=shape,
        plan=_make_plan(job, strength),
        strength=strength,
        conditioning=Conditioning(components, settings, texts, (image.height, image.width), device),
        mask=None if image.mask is None else image.mask.mask.to(device),
    )
    pixels = None if image.pixels is None else image.pixels.to(device)
    if components.upscales:
        return replace(stage, small=pixels)
    if components.inpaints:
        stage = replace(stage, concat=_masked_image_latents(job, stage, pixels, notes))
        if stage.mask is not None and strength == 1:
            return stage  # whose network sees what to keep
    if pixels is None:
        return stage
    return replace(stage, image_latents=encode_image(components, execution, pixels, notes))


def _check_noise(noise: object, expected: tuple[int, ...]) -> None:
    if noise is None:
        return
    if not isinstance(noise, Tensor) or noise.layout != torch.strided or noise.is_meta or not noise.is_floating_point():
        raise InputError(f"latents must be a dense tensor of numbers, got {shown(noise)}; pass standard normal noise")
    if noise.shape != expected:
        raise InputError(f"latents must have shape {expected}, got {tuple(noise.shape)}; one for each image")
    if not torch.isfinite(noise.float()).all():
        raise InputError("latents must be finite, got NaN or infinity; pass standard normal noise")


def _make_plan(job: Job, strength: float) -> Plan | SchedulerPlan:
    settings, schedule = job.settings, job.components.schedule
    if settings.sampler == TUNED:
        return job.components.tuned_table(settings.num_inference_steps).plan(strength)
    if job.scheduler is None:
        options: dict[str, Any] = {"eta": settings.eta, "resampling": settings.resampling}
        return make_plan(schedule, settings.sampler, **settings.levels, strength=strength, **options)
    needing = {
        "a mask": job.image.mask is not None,
        "resampling": settings.resampling > 1,
        "eta": settings.eta > 0,
        "this self-conditioned model": job.components.unet.config.self_conditioning,
    }
    for what in (name for name, given in needing.items() if given):
        raise InputError(f"{what} needs one of our samplers, got a scheduler object; pass its name instead")
    return SchedulerPlan(job.scheduler, schedule, **settings.levels, strength=strength)


def _settled(settings: Settings, components: Components, image: PreparedImage) -> Settings:
    """Return the settings with the size of the image that is generated, less what is outpainted."""
    if components.upscales:
        return replace(settings, height=None, width=None)
    left, top, right, bottom = settings.outpaint or (0, 0, 0, 0)
    return replace(settings, height=image.height - top - bottom, width=image.width - left - right)


def _masked_image_latents(job: Job, stage: Stage, pixels: Tensor | None, notes: list[str]) -> Tensor:
    """Return the mask and the latents of the image where it is kept, (1, 1 + C, h, w).

    Source: Rombach et al. 2022, arXiv 2112.10752, section 4.5, as the published inpainting models have it.
    """
    factor, size = job.components.autoencoder.config.downsample_factor, (stage.image.height, stage.image.width)
    device = job.execution.device
    mask = torch.ones(1, 1, *size, device=device) if stage.mask is None else stage.mask
    image = torch.zeros(1, 3, *size, device=device) if pixels is None else pixels
    small = F.interpolate(mask, scale_factor=1 / factor, mode="nearest")  # (1, 1, h, w)
    return torch.cat([small, encode_image(job.components, job.execution, image * (mask == 0), notes)], dim=1)
