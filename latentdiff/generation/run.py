"""Run a request: prepare what its images share, then sample and decode them, batch by batch.

`prepare` makes one `Stage`, or two where a request is generated in two passes; `sample_stages` samples the latents of
some images through them. The sampling loop itself is `diffusion.loop.sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff.checkpoints import Components
from latentdiff.diffusion import (
    KnownRegion,
    Plan,
    Scheduler,
    SchedulerPlan,
    Step,
    draw_noise,
    image_generator,
    make_inversion_plan,
    make_plan,
    sample,
    slerp,
    start,
)
from latentdiff.diffusion.plan import overshoot_note
from latentdiff.engine.execution import Execution
from latentdiff.engine.tiled_denoising import Windows
from latentdiff.errors import InputError, shown
from latentdiff.generation.decode import OUTPUT_TYPES, decode_latents, encode_image, with_opacity
from latentdiff.generation.guided_unet import guided_network
from latentdiff.generation.inputs import PreparedImage, hires_size
from latentdiff.generation.options import check_integer
from latentdiff.generation.request import Settings
from latentdiff.generation.result import GeneratedImage, call_record
from latentdiff.generation.text import Conditioning, encode_texts
from latentdiff.generation.upscale import plan_upscale
from latentdiff.prompts import prompt_notes

__all__ = ["Call", "Callback", "Stage", "invert", "run"]

# (steps done, steps in all, newest estimate of the batch's clean latents (b, C, h, w)) -> None
Callback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Call:
    """A request with the model and the inputs it is for.

    Attributes:
        image: prepared for the first pass, where there are two.
        noise: standard normal noise (N, C, h, w) in place of that of the seeds, or None.
        scheduler: of diffusers, in place of the sampler of the settings, or None.
    """

    components: Components
    execution: Execution
    settings: Settings
    image: PreparedImage
    noise: Tensor | None = None
    scheduler: Scheduler | None = None


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


@torch.no_grad()
def run(
    call: Call, output_type: str, batch_size: int, callback: Callback | None = None, progress: bool = False
) -> Iterator[GeneratedImage]:
    """Yield the images of a request in order, each as soon as it is decoded.

    Raises:
        InputError: the request does not fit the model, or an output of a network is not finite.
    """
    notes = [*call.image.notes, *_remarks(call)]
    stages = prepare(call, notes)
    unstable = (overshoot_note(stage.plan, call.settings.sampler) for stage in stages if isinstance(stage.plan, Plan))
    notes += dict.fromkeys(note for note in unstable if note is not None)
    batches = make_batches(call.settings.count, stages[0].conditioning, batch_size)
    if call.components.upscales:
        stages = [replace(stages[0], windows=_windows(call, max(map(len, batches))))]
    _check_noise(call.noise, (call.settings.count, *stages[0].shape))
    steps = sum(len(stage.plan) for stage in stages) * len(batches)
    record = call_record(call.components, call.execution, stages[0].settings, _given(call, stages[-1].image))
    with _counted_steps(steps, callback, progress) as on_step:
        for batch in batches:
            with call.execution.onload(call.components.unet):
                latents = sample_stages(call, stages, batch, on_step)
            # Decoded one by one, since a decoder needs far more memory than a U-Net.
            for row, index in enumerate(batch):
                image = _finish(call, stages[-1], latents[row : row + 1], output_type, notes)
                tokens, windows = stages[0].conditioning.counts(index)
                yield GeneratedImage(image, record(index, len(batch), row), tokens, windows, tuple(notes))
                notes.clear()


def prepare(call: Call, notes: list[str]) -> list[Stage]:
    """Return the sampling passes of a request; nothing is encoded or opened after that."""
    components, settings, image = call.components, call.settings, call.image
    with call.execution.onload(components.text_encoder, components.text_encoder_2):
        texts = encode_texts(components, settings)
    stages = [prepare_stage(call, texts, image, settings.strength, notes)]
    if settings.hires > 1 and image.pixels is None and not components.upscales:
        height, width = hires_size(
            settings, (image.height, image.width), components.autoencoder.config.downsample_factor
        )
        large = replace(image, height=height, width=width, size=(width, height))
        stages.append(prepare_stage(call, texts, large, settings.hires_strength, notes))
    return stages


def prepare_stage(
    call: Call, texts: Mapping[str, Any], image: PreparedImage, strength: float, notes: list[str]
) -> Stage:
    """Return one sampling pass."""
    components, execution, device = call.components, call.execution, call.execution.device
    factor = components.autoencoder.config.downsample_factor
    settings = _settled(call.settings, components, image)
    shape = (components.autoencoder.config.latent_channels, image.height // factor, image.width // factor)
    stage = Stage(
        settings=settings,
        image=image,
        shape=shape,
        plan=_make_plan(call, strength),
        strength=strength,
        conditioning=Conditioning(components, settings, texts, (image.height, image.width), device),
        mask=None if image.mask is None else image.mask.mask.to(device),
    )
    pixels = None if image.pixels is None else image.pixels.to(device)
    if components.upscales:
        return replace(stage, small=pixels)
    if components.inpaints:
        stage = replace(stage, concat=_masked_image_latents(call, stage, pixels, notes))
        if stage.mask is not None and strength == 1:
            return stage  # whose network sees what to keep
    if pixels is None:
        return stage
    return replace(stage, image_latents=encode_image(components, execution, pixels, notes))


def sample_stages(
    call: Call, stages: Sequence[Stage], images: Sequence[int], on_step: Callable[[Step], None]
) -> Tensor:
    """Return the scaled latents (b, C, h, w) float32 of some images: of each pass from those of the one before."""
    generators = [image_generator(call.settings.seeds(index)[0]) for index in images]
    latents = None
    for stage in stages:
        if latents is not None:
            latents = F.interpolate(latents, stage.shape[1:], mode="bicubic")
        latents = sample_stage(call, stage, images, generators, on_step, latents)
    assert latents is not None
    return latents


def sample_stage(
    call: Call,
    stage: Stage,
    images: Sequence[int],
    generators: Sequence[torch.Generator],
    on_step: Callable[[Step], None],
    latents: Tensor | None = None,
) -> Tensor:
    """Return the scaled latents (b, C, h, w) float32 of some images after one pass.

    Args:
        images: their numbers.
        generators: of these images.
        on_step: called after each step.
        latents: (b, C, h, w) to start from; None for those of the initial image, if there is one.
    """
    concat = stage.concat if stage.small is None else _noised(call.components, stage, generators)
    noise = _initial_noise(call, stage, images, generators, first=latents is None)
    sees_all = stage.concat is not None and stage.strength == 1  # what to keep, by the network itself
    if latents is None and stage.image_latents is not None and not sees_all:
        latents = stage.image_latents.expand_as(noise)
    network = guided_network(
        call.components, stage.settings, stage.conditioning.of(images), stage.plan, concat, stage.windows
    )
    if isinstance(stage.plan, SchedulerPlan):
        steps = stage.plan.run(network, noise, generators, latents)
    else:
        x, known = start(stage.plan, noise, latents), None
        if stage.mask is not None and latents is not None and stage.concat is None:
            known = KnownRegion(_latent_mask(call.components, stage.mask, len(noise)), latents)
            if stage.strength == 1:  # nothing of the image is left where it is generated
                x = torch.lerp(x, start(stage.plan, noise), known.mask)
        steps = sample(call.components.denoiser(network), stage.plan, x, generators, known)
    for step in steps:
        on_step(step)
    return step.x


@torch.no_grad()
def invert(call: Call, iterations: int) -> Tensor:
    """Return the noise (1, C, h, w) float32 from which the sampler ddim generates the initial image."""
    (stage,) = prepare(call, [])
    if stage.image_latents is None:
        raise InputError("only pictures of text-to-image models are inverted, got a model that enlarges; use another")
    plan = make_inversion_plan(call.components.schedule, call.settings.num_inference_steps, iterations)
    with call.execution.onload(call.components.unet):
        conditioning = stage.conditioning.of([0])
        network = guided_network(call.components, stage.settings, conditioning, plan, stage.concat)
        *_, step = sample(call.components.denoiser(network), plan, stage.image_latents)
    return step.x


def _check_noise(noise: object, expected: tuple[int, ...]) -> None:
    if noise is None:
        return
    if not isinstance(noise, Tensor) or noise.layout != torch.strided or noise.is_meta or not noise.is_floating_point():
        raise InputError(f"latents must be a dense tensor of numbers, got {shown(noise)}; pass standard normal noise")
    if noise.shape != expected:
        raise InputError(f"latents must have shape {expected}, got {tuple(noise.shape)}; one for each image")
    if not torch.isfinite(noise.float()).all():
        raise InputError("latents must be finite, got NaN or infinity; pass standard normal noise")


def _remarks(call: Call) -> list[str]:
    """Return notes on the texts, unless brackets are plain text in them."""
    settings = call.settings
    texts = dict.fromkeys([*settings.prompts, settings.negative_prompt, settings.blend_prompt])
    found = (note for text in texts for note in prompt_notes(text))
    return list(dict.fromkeys(found)) if settings.prompt_weights else []


def _given(call: Call, image: PreparedImage) -> dict[str, Any]:
    """Return what a record keeps of the inputs."""
    size = {} if image.size is None else {"size": list(image.size)}
    return {**image.given, **size, "latents_given": call.noise is not None}


def make_batches(count: int, conditioning: Conditioning, batch_size: int) -> list[list[int]]:
    """Return the numbers of the images to sample together: at most `batch_size`, with equally many text windows."""
    runs = [list(same) for _, same in groupby(range(count), key=conditioning.window_count)]
    return [same[first : first + batch_size] for same in runs for first in range(0, len(same), batch_size)]


def _make_plan(call: Call, strength: float) -> Plan | SchedulerPlan:
    settings, schedule = call.settings, call.components.schedule
    if call.scheduler is None:
        options: dict[str, Any] = {"eta": settings.eta, "resampling": settings.resampling}
        return make_plan(schedule, settings.sampler, **settings.levels, strength=strength, **options)
    needing = {
        "a mask": call.image.mask is not None,
        "resampling": settings.resampling > 1,
        "eta": settings.eta > 0,
        "this self-conditioned model": call.components.unet.config.self_conditioning,
    }
    for what in (name for name, given in needing.items() if given):
        raise InputError(f"{what} needs one of our samplers, got a scheduler object; pass its name instead")
    return SchedulerPlan(call.scheduler, schedule, **settings.levels, strength=strength)


def _settled(settings: Settings, components: Components, image: PreparedImage) -> Settings:
    """Return the settings with the size of the image that is generated, less what is outpainted."""
    if components.upscales:
        return replace(settings, height=None, width=None)
    left, top, right, bottom = settings.outpaint or (0, 0, 0, 0)
    return replace(settings, height=image.height - top - bottom, width=image.width - left - right)


def _windows(call: Call, images: int) -> Windows:
    """Return the windows in which a map is denoised, `images` at once."""
    levels = call.components.unet.config.num_class_embeds or 1000
    check_integer("noise_level", call.settings.noise_level, 0, levels - 1, f"try {min(20, levels - 1)}")
    factor = call.components.autoencoder.config.downsample_factor
    size = (call.image.width // factor, call.image.height // factor)
    return plan_upscale(call.components, size, call.execution.device, images).windows


def _masked_image_latents(call: Call, stage: Stage, pixels: Tensor | None, notes: list[str]) -> Tensor:
    """Return the mask and the latents of the image where it is kept, (1, 1 + C, h, w).

    Source: Rombach et al. 2022, arXiv 2112.10752, section 4.5, as the published inpainting models have it.
    """
    factor, size = call.components.autoencoder.config.downsample_factor, (stage.image.height, stage.image.width)
    device = call.execution.device
    mask = torch.ones(1, 1, *size, device=device) if stage.mask is None else stage.mask
    image = torch.zeros(1, 3, *size, device=device) if pixels is None else pixels
    small = F.interpolate(mask, scale_factor=1 / factor, mode="nearest")  # (1, 1, h, w)
    return torch.cat([small, encode_image(call.components, call.execution, image * (mask == 0), notes)], dim=1)


def _noised(components: Components, stage: Stage, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the small picture with noise of each image's own, (b, 3, h, w).

    Source: Ho et al. 2021, arXiv 2106.15282, section 3 (noise conditioning augmentation).
    """
    small, schedule = stage.small, components.low_res_schedule
    assert small is not None and schedule is not None
    noise = draw_noise(generators, tuple(small.shape[1:])).to(small)
    level = torch.full((len(generators),), stage.settings.noise_level, device=small.device)
    return schedule.add_noise(small.expand_as(noise), noise, level)


def _latent_mask(components: Components, mask: Tensor, count: int) -> Tensor:
    """Return a mask (1, 1, H, W) in latents, (b, 1, h, w): 1 where any pixel of a latent is."""
    return F.max_pool2d(mask, components.autoencoder.config.downsample_factor).expand(count, -1, -1, -1)


def _initial_noise(
    call: Call, stage: Stage, images: Sequence[int], generators: Sequence[torch.Generator], first: bool
) -> Tensor:
    """Return standard normal noise (b, C, h, w) on the device; passed in, or of the seeds and their variations."""
    settings, noise = call.settings, draw_noise(generators, stage.shape)
    if first and call.noise is not None:
        noise = call.noise[list(images)].float().cpu()
    if first and settings.variation_strength:
        others = [image_generator(settings.seeds(index)[1]) for index in images]
        noise = slerp(noise, draw_noise(others, stage.shape), settings.variation_strength)
    return noise.to(call.execution.device, torch.float32)


def _finish(call: Call, stage: Stage, latents: Tensor, output_type: str, notes: list[str]) -> Any:
    """Return one image in the form that was asked for."""
    if output_type == "latent":
        return latents[0]
    correction = stage.settings.correction
    pixels = decode_latents(call.components, call.execution, latents, stage.image, correction, notes)
    image = OUTPUT_TYPES[output_type](pixels)[0]
    return with_opacity(image, stage.image) if output_type == "pil" else image


@contextmanager
def _counted_steps(total: int, callback: Callback | None, progress: bool) -> Iterator[Callable[[Step], None]]:
    """Yield what is called after each step; it moves the bar and calls the callback."""
    done = 0
    with tqdm(total=total, unit="step", leave=False, disable=not progress) as bar:

        def on_step(step: Step) -> None:
            nonlocal done
            done += 1
            bar.update()
            if callback is not None:
                callback(done, total, step.denoised)

        yield on_step
