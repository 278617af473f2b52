"""The mathematics of diffusion, without weights: noise schedule, prediction types, samplers, guidance.

plan = make_plan(schedule, "dpmpp_2m", num_inference_steps=20)
generators = [image_generator(seed) for seed in seeds]
x = start(plan, draw_noise(generators, (C, H, W)))
for step in sample(as_denoiser(network, schedule.prediction_type), plan, x, generators):
    ...
latents = step.x
"""

from __future__ import annotations

from latentdiff.diffusion.diffusers_scheduler import Scheduler, SchedulerPlan
from latentdiff.diffusion.discretization import Discretization
from latentdiff.diffusion.guidance import adaptive_projected, classifier_free, guidance_scales, rescaled
from latentdiff.diffusion.inversion import make_inversion_plan
from latentdiff.diffusion.loop import (
    KnownRegion,
    Question,
    Step,
    draw_noise,
    image_generator,
    sample,
    sampling,
    slerp,
    start,
)
from latentdiff.diffusion.plan import Plan, make_plan, overshoot, overshoot_note, parse_sampler
from latentdiff.diffusion.prediction import Call, as_denoiser, preconditioning
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.schedule import NoiseSchedule

__all__ = [
    "SAMPLERS",
    "Call",
    "Discretization",
    "KnownRegion",
    "NoiseSchedule",
    "Plan",
    "Question",
    "Scheduler",
    "SchedulerPlan",
    "Step",
    "adaptive_projected",
    "as_denoiser",
    "classifier_free",
    "draw_noise",
    "guidance_scales",
    "image_generator",
    "make_inversion_plan",
    "make_plan",
    "overshoot",
    "overshoot_note",
    "parse_sampler",
    "preconditioning",
    "rescaled",
    "sample",
    "sampling",
    "slerp",
    "start",
]
