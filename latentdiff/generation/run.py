"""Run a request: prepare what its images share, then sample and decode them, batch by batch.

`run` has the order of it; `sample_stage` samples the latents of some images; `guided_network` makes the function that
calls the U-Net with and without the prompt. The sampling loop itself is `diffusion.loop.sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff.checkpoints import Components
from latentdiff.diffusion import (
    Call,
    KnownRegion,
    Plan,
    SchedulerPlan,
    Step,
    adaptive_projected,
    classifier_free,
    draw_noise,
    guidance_scales,
    image_generator,
    make_inversion_plan,
    preconditioning,
    rescaled,
    sample,
    slerp,
    start,
)
from latentdiff.diffusion.plan import overshoot_note
from latentdiff.diffusion.prediction import Network
from latentdiff.engine.tiled_denoising import Windows, tiled
from latentdiff.errors import InputError
from latentdiff.generation.decode import OUTPUT_TYPES, decode_latents, with_opacity
from latentdiff.generation.inputs import PreparedImage
from latentdiff.generation.options import check_integer
from latentdiff.generation.request import Settings
from latentdiff.generation.result import GeneratedImage, call_record
from latentdiff.generation.stages import Job, Stage, prepare
from latentdiff.generation.text import BatchConditioning, Conditioning
from latentdiff.generation.upscale import plan_upscale
from latentdiff.prompts import prompt_notes

__all__ = ["Callback", "invert", "run"]

# (steps done, steps in all, newest estimate of the batch's clean latents (b, C, h, w)) -> None
Callback = Callable[[int, int, Tensor], None]


@torch.no_grad()
def run(
    job: Job, output_type: str, batch_size: int, callback: Callback | None = None, progress: bool = False
) -> Iterator[GeneratedImage]:
    """Yield the images of a request in order, each as soon as it is decoded.

    Raises:
        InputError: the request does not fit the model, or an output of a network is not finite.
    """
    notes = [*job.image.notes, *_remarks(job)]
    stages = prepare(job, notes)
    unstable = (overshoot_note(stage.plan, job.settings.sampler) for stage in stages if isinstance(stage.plan, Plan))
    notes += dict.fromkeys(note for note in unstable if note is not None)
    batches = make_batches(job.settings.count, stages[0].conditioning, batch_size)
    if job.components.upscales:
        stages = [replace(stages[0], windows=_windows(job, max(map(len, batches))))]
    steps = sum(len(stage.plan) for stage in stages) * len(batches)
    record = call_record(job.components, job.execution, stages[0].settings, _given(job, stages[-1].image))
    with _counted_steps(steps, callback, progress) as on_step:
        for batch in batches:
            with job.execution.onload(job.components.unet):
                latents = sample_stages(job, stages, batch, on_step)
            # Decoded one by one, since a decoder needs far more memory than a U-Net.
            for row, index in enumerate(batch):
                image = _finish(job, stages[-1], latents[row : row + 1], output_type, notes)
                tokens, windows = stages[0].conditioning.counts(index)
                yield GeneratedImage(image, record(index, len(batch), row), tokens, windows, tuple(notes))
                notes.clear()


def sample_stages(job: Job, stages: Sequence[Stage], images: Sequence[int], on_step: Callable[[Step], None]) -> Tensor:
    """Return the scaled latents (b, C, h, w) float32 of some images: of each pass from those of the one before."""
    generators = [image_generator(job.settings.seeds(index)[0]) for index in images]
    latents = sample_stage(job, stages[0], images, generators, on_step)
    for stage in stages[1:]:
        larger = F.interpolate(latents, stage.shape[1:], mode="bicubic")
        latents = sample_stage(job, stage, images, generators, on_step, larger)
    return latents


def sample_stage(
    job: Job,
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
    concat = stage.concat if stage.small is None else _noised(job.components, stage, generators)
    noise = _initial_noise(job, stage, images, generators, first=latents is None)
    sees_all = stage.concat is not None and stage.strength == 1  # what to keep, by the network itself
    if latents is None and stage.image_latents is not None and not sees_all:
        latents = stage.image_latents.expand_as(noise)
    network = guided_network(
        job.components, stage.settings, stage.conditioning.of(images), stage.plan, concat, stage.windows
    )
    if isinstance(stage.plan, SchedulerPlan):
        steps = stage.plan.run(network, noise, generators, latents)
    else:
        x, known = start(stage.plan, noise, latents), None
        if stage.mask is not None and latents is not None and stage.concat is None:
            known = KnownRegion(_latent_mask(job.components, stage.mask, len(noise)), latents)
            if stage.strength == 1:  # nothing of the image is left where it is generated
                x = torch.lerp(x, start(stage.plan, noise), known.mask)
        steps = sample(job.components.denoiser(network), stage.plan, x, generators, known)
    for step in steps:
        on_step(step)
    return step.x


def guided_network(
    components: Components,
    settings: Settings,
    cond: BatchConditioning,
    plan: Plan | SchedulerPlan,
    concat: Tensor | None = None,
    windows: Windows | None = None,
) -> Network:
    """Return the guided network for a batch of b images, text and time computed once.

    Args:
        components: of the model.
        settings: of the job.
        cond: conditioning of these images.
        plan: whose timesteps it is called at.
        concat: (b or 1, C', h, w) input channels besides x, or None.
        windows: in which it looks at the map; None for all of it at once.
    """
    unet, context = components.unet, cond.context
    count, dtype = len(context) // 2, unet.conv_in.weight.dtype
    scales = guidance_scales(
        plan.sigmas, settings.guidance_scale, settings.guidance_interval, settings.guidance_schedule
    ).tolist()
    if unet.config.time_cond_proj_dim is not None or _same_halves(cond):  # the network itself knows the scale, or
        scales = [1.0] * len(scales)  # there is nothing to steer away from
    timesteps = plan.timesteps.to(context.device, torch.float32)
    prepared = unet.prepare(timesteps, context, added=cond.added, class_labels=cond.class_labels)
    guided, unguided = (tiled(one, windows) for one in (prepared, prepared.rows(slice(count, 2 * count))))

    def network(model_input: Tensor, call: Call) -> Tensor:
        scale, inputs = scales[call.index], model_input
        if concat is not None:
            inputs = torch.cat([inputs, concat.expand(len(inputs), -1, -1, -1)], dim=1)
        inputs = inputs.to(dtype)
        if scale == 1:
            return unguided(inputs, call.rows).float()
        both = guided(torch.cat([inputs, inputs]), call.rows.repeat(2)).float()  # (2b, C, h, w)
        unconditional, conditional = both.chunk(2)
        return _guide(components, settings, conditional, unconditional, scale, model_input, call)

    return network


def _same_halves(cond: BatchConditioning) -> bool:
    """Say whether conditional and unconditional halves are equal, as with two empty prompts; nothing is guided then."""
    return all(torch.equal(*tensor.chunk(2)) for tensor in (cond.context, *cond.added.values()))


def _guide(
    components: Components,
    settings: Settings,
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    inputs: Tensor,
    call: Call,
) -> Tensor:
    """Return the guided output (b, C, h, w); where the network learns its variance, that of the conditional one."""
    channels = components.autoencoder.config.latent_channels
    shares = conditional[:, channels:]  # none, or (b, C, h, w)
    conditional, unconditional = conditional[:, :channels], unconditional[:, :channels]
    if settings.guidance_parallel == 1 and settings.guidance_limit is None:
        guided = classifier_free(conditional, unconditional, scale, settings.guidance_rescale)
        return torch.cat([guided, shares], dim=1)
    sigmas = call.sigmas.reshape(-1, 1, 1, 1)
    c_skip, c_out, c_in = preconditioning(components.schedule.prediction_type, sigmas)
    skipped = c_skip / c_in * inputs[:, :channels]
    guided = adaptive_projected(  # of x0 estimates
        skipped + c_out * conditional,
        skipped + c_out * unconditional,
        scale,
        parallel=settings.guidance_parallel,
        limit=settings.guidance_limit,
    )
    guided = (guided - skipped) / c_out
    return torch.cat([rescaled(guided, conditional, settings.guidance_rescale), shares], dim=1)


@torch.no_grad()
def invert(job: Job, iterations: int) -> Tensor:
    """Return the noise (1, C, h, w) float32 from which the sampler ddim generates the initial image."""
    (stage,) = prepare(job, [])
    if stage.image_latents is None:
        raise InputError("only pictures of text-to-image models are inverted, got a model that enlarges; use another")
    plan = make_inversion_plan(job.components.schedule, job.settings.num_inference_steps, iterations)
    with job.execution.onload(job.components.unet):
        conditioning = stage.conditioning.of([0])
        network = guided_network(job.components, stage.settings, conditioning, plan, stage.concat)
        *_, step = sample(job.components.denoiser(network), plan, stage.image_latents)
    return step.x


def _remarks(job: Job) -> list[str]:
    """Return notes on the texts, unless brackets are plain text in them."""
    settings = job.settings
    texts = dict.fromkeys([*settings.prompts, settings.negative_prompt, settings.blend_prompt])
    found = (note for text in texts for note in prompt_notes(text))
    return list(dict.fromkeys(found)) if settings.prompt_weights else []


def _given(job: Job, image: PreparedImage) -> dict[str, Any]:
    """Return what a record keeps of the inputs."""
    size = {} if image.size is None else {"size": list(image.size)}
    return {**image.given, **size, "latents_given": job.noise is not None}


def make_batches(count: int, conditioning: Conditioning, batch_size: int) -> list[list[int]]:
    """Return the numbers of the images to sample together: at most `batch_size`, with equally many text windows."""
    runs = [list(same) for _, same in groupby(range(count), key=conditioning.window_count)]
    return [same[first : first + batch_size] for same in runs for first in range(0, len(same), batch_size)]


def _windows(job: Job, images: int) -> Windows:
    """Return the windows in which a map is denoised, `images` at once."""
    levels = job.components.unet.config.num_class_embeds or 1000
    check_integer("noise_level", job.settings.noise_level, 0, levels - 1, f"try {min(20, levels - 1)}")
    factor = job.components.autoencoder.config.downsample_factor
    size = (job.image.width // factor, job.image.height // factor)
    return plan_upscale(job.components, size, job.execution.device, images).windows


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
    job: Job, stage: Stage, images: Sequence[int], generators: Sequence[torch.Generator], first: bool
) -> Tensor:
    """Return standard normal noise (b, C, h, w) on the device; passed in, or of the seeds and their variations."""
    settings, noise = job.settings, draw_noise(generators, stage.shape)
    if first and job.noise is not None:
        noise = job.noise[list(images)].float().cpu()
    if first and settings.variation_strength:
        others = [image_generator(settings.seeds(index)[1]) for index in images]
        noise = slerp(noise, draw_noise(others, stage.shape), settings.variation_strength)
    return noise.to(job.execution.device, torch.float32)


def _finish(job: Job, stage: Stage, latents: Tensor, output_type: str, notes: list[str]) -> Any:
    """Return one image in the form that was asked for."""
    if output_type == "latent":
        return latents[0]
    correction = stage.settings.correction
    pixels = decode_latents(job.components, job.execution, latents, stage.image, correction, notes)
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
