"""Run a request: prepare what its images share, then sample and decode them, batch by batch.

`run` has the order of it; `image_steps` samples the latents of some images; the network it asks, which calls the U-Net
with and without the prompt, is in `guided.py`, and the sampling loop itself is `diffusion.loop.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    Question,
    SchedulerPlan,
    Step,
    draw_noise,
    image_generator,
    make_inversion_plan,
    sampling,
    slerp,
    start,
)
from latentdiff.diffusion.loop import Questions
from latentdiff.diffusion.plan import overshoot_note
from latentdiff.diffusion.tuned import TUNED
from latentdiff.engine.tiled_denoising import Windows
from latentdiff.errors import InputError
from latentdiff.generation.batches import make_batches, text_notes
from latentdiff.generation.decode import OUTPUT_TYPES, decode_latents, with_opacity
from latentdiff.generation.guided import Guided, UNetCall, guided_network
from latentdiff.generation.inputs import PreparedImage
from latentdiff.generation.options import check_integer
from latentdiff.generation.result import GeneratedImage, call_record, image_record
from latentdiff.generation.stages import Job, Stage, prepare
from latentdiff.generation.upscale import plan_upscale

__all__ = ["Callback", "Drawing", "ImageSteps", "image_steps", "invert", "prepare_drawing", "run"]

# (steps done, steps in all, newest estimate of the batch's clean latents (b, C, h, w)) -> None
Callback = Callable[[int, int, Tensor], None]
ImageSteps = Generator[UNetCall | Step, Tensor, Tensor]
"""See `image_steps`."""


@torch.no_grad()
def run(
    job: Job, output_type: str, batch_size: int, callback: Callback | None = None, progress: bool = False
) -> Iterator[GeneratedImage]:
    """Yield the images of a request in order, each as soon as it is decoded.

    Raises:
        InputError: the request does not fit the model, or an output of a network is not finite.
    """
    drawing = prepare_drawing(job, batch_size)
    batches = make_batches(job.settings.count, drawing.stages[0].conditioning.window_count, batch_size)
    with _counted_steps(drawing.steps * len(batches), callback, progress) as on_step:
        for batch in batches:
            with job.execution.onload(job.components.unet):
                latents = sample_stages(job, drawing.stages, batch, on_step)
            # Decoded one by one, since a decoder needs far more memory than a U-Net.
            for row, index in enumerate(batch):
                yield drawing.finish(latents[row : row + 1], index, (len(batch), row), output_type)


@dataclass(frozen=True)
class Drawing:
    """A request, prepared: all that its images share.

    Attributes:
        job: the request.
        stages: its passes.
        record: see `call_record`.
        notes: messages to the caller, which the image that is finished next takes along.
    """

    job: Job
    stages: list[Stage]
    record: dict[str, Any]
    notes: list[str]

    @property
    def steps(self) -> int:
        """How many steps an image takes."""
        return sum(len(stage.plan) for stage in self.stages)

    def finish(self, latents: Tensor, index: int, place: tuple[int, int], output_type: str) -> GeneratedImage:
        """Decode the sampled latents (1, C, h, w) of image `index`.

        Args:
            place: size of the batch it was drawn in, and its row there.
            output_type: a key of `OUTPUT_TYPES`.
        """
        image = _finish(self.job, self.stages[-1], latents, output_type, self.notes)
        tokens, windows = self.stages[0].conditioning.counts(index)
        record = image_record(self.stages[0].settings, self.record, index, place)
        finished = GeneratedImage(image, record, tokens, windows, tuple(self.notes))
        self.notes.clear()
        return finished


def prepare_drawing(job: Job, batch_size: int) -> Drawing:
    """Encode the texts and pictures of a request, and plan its passes.

    Args:
        job: the request.
        batch_size: how many images are drawn at once at most.

    Raises:
        InputError: the request does not fit the model.
    """
    notes = [*job.image.notes, *text_notes(job.settings), *_tuned_otherwise(job)]
    stages = prepare(job, notes)
    unstable = (overshoot_note(stage.plan, job.settings.sampler) for stage in stages if isinstance(stage.plan, Plan))
    notes += dict.fromkeys(note for note in unstable if note is not None)
    if job.components.upscales:
        largest = max(map(len, make_batches(job.settings.count, stages[0].conditioning.window_count, batch_size)))
        stages = [replace(stages[0], windows=_windows(job, largest))]
    record = call_record(job.components, job.execution, stages[0].settings, _given(job, stages[-1].image))
    return Drawing(job, stages, record, notes)


def sample_stages(job: Job, stages: Sequence[Stage], images: Sequence[int], on_step: Callable[[Step], None]) -> Tensor:
    """Return the scaled latents (b, C, h, w) float32 of some images: of each pass from those of the one before."""
    return _run_calls(image_steps(job, stages, images), on_step)


def _run_calls(steps: ImageSteps, on_step: Callable[[Step], None] | None = None) -> Tensor:
    """Answer the calls of the U-Net one by one, and return the sampled latents (b, C, h, w)."""
    output: Tensor | None = None
    while True:
        try:
            item = next(steps) if output is None else steps.send(output)
        except StopIteration as sampled:
            return sampled.value
        output = item.run() if isinstance(item, UNetCall) else None
        if isinstance(item, Step) and on_step is not None:
            on_step(item)


def image_steps(job: Job, stages: Sequence[Stage], images: Sequence[int]) -> ImageSteps:
    """Sample some images, leaving the calls of the U-Net to the caller, who may join those of several requests.

    Each pass starts from the result of the one before.

    Returns:
        Yields each call and is sent its output (b, C', h, w); yields the `Step` of the batch after each row; returns
        the scaled latents (b, C, h, w) float32.
    """
    generators = [image_generator(job.settings.seeds(index)[0]) for index in images]
    latents = yield from _stage_steps(job, stages[0], images, generators)
    for stage in stages[1:]:
        larger = F.interpolate(latents, stage.shape[1:], mode="bicubic")
        latents = yield from _stage_steps(job, stage, images, generators, larger)
    return latents


def _stage_steps(
    job: Job,
    stage: Stage,
    images: Sequence[int],
    generators: Sequence[torch.Generator],
    latents: Tensor | None = None,
) -> ImageSteps:
    """Sample some images in one pass, see `image_steps`.

    Args:
        images: their numbers.
        generators: of these images.
        latents: (b, C, h, w) to start from; None for those of the initial image, if there is one.
    """
    concat = stage.concat if stage.small is None else _noised(job.components, stage, generators)
    noise = _initial_noise(job, stage, images, generators, first=latents is None)
    sees_all = stage.concat is not None and stage.strength == 1  # what to keep, by the network itself
    if latents is None and stage.image_latents is not None and not sees_all:
        latents = stage.image_latents.expand_as(noise)
    cond = stage.conditioning.of(images)
    guided = guided_network(job.components, job.execution, stage.settings, cond, stage.plan, concat, stage.windows)
    if isinstance(stage.plan, SchedulerPlan):
        return (yield from _asked(stage.plan.sampling(noise, generators, latents), guided))
    x, known = start(stage.plan, noise, latents), None
    if stage.mask is not None and latents is not None and stage.concat is None:
        known = KnownRegion(_latent_mask(job.components, stage.mask, len(noise)), latents)
        if stage.strength == 1:  # nothing of the image is left where it is generated
            x = torch.lerp(x, start(stage.plan, noise), known.mask)
    denoiser = job.components.denoiser(_answered_by_others)
    return (yield from _asked(sampling(denoiser, stage.plan, x, generators, known), guided))


def _asked(questions: Questions, guided: Guided) -> ImageSteps:
    """Turn the questions of a sampler into calls of the U-Net; return the sampled latents."""
    for item in questions:
        while isinstance(item, Question):
            item = questions.send((yield from guided(item.inputs, item.call)))
        step = item
        yield step
    return step.x


def _answered_by_others(inputs: Tensor, call: Call) -> Tensor:
    raise AssertionError("the guided network is asked through its questions")


@torch.no_grad()
def invert(job: Job, iterations: int) -> Tensor:
    """Return the noise (1, C, h, w) float32 from which the sampler ddim generates the initial image."""
    (stage,) = prepare(job, [])
    if stage.image_latents is None:
        raise InputError("only pictures of text-to-image models are inverted, got a model that enlarges; use another")
    plan = make_inversion_plan(job.components.schedule, job.settings.num_inference_steps, iterations)
    with job.execution.onload(job.components.unet):
        cond = stage.conditioning.of([0])
        guided = guided_network(job.components, job.execution, stage.settings, cond, plan, stage.concat)
        questions = sampling(job.components.denoiser(_answered_by_others), plan, stage.image_latents)
        return _run_calls(_asked(questions, guided))


def _tuned_otherwise(job: Job) -> list[str]:
    """Return a note where a tuned sampler is used with another guidance than it was tuned for."""
    settings = job.settings
    if settings.sampler != TUNED:
        return []
    tuned, asked = job.components.tuned_table(settings.num_inference_steps).guidance_scale, settings.guidance_scale
    if max(tuned, 1) == max(asked, 1):  # 1 and below are not guided
        return []
    return [
        f"the tuned sampler was tuned at guidance {tuned:g}, got {asked:g}; at that one it is nearest to many steps"
    ]


def _given(job: Job, image: PreparedImage) -> dict[str, Any]:
    """Return what a record keeps of the inputs."""
    size = {} if image.size is None else {"size": list(image.size)}
    return {**image.given, **size, "latents_given": job.noise is not None}


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
