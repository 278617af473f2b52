"""Against diffusers' schedulers: singlestep, Runge-Kutta start, last noise level, thresholds, timesteps by hand."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from latentdiff.diffusion import NoiseSchedule, Plan, as_denoiser, draw_noise, image_generator, make_plan, sample, start
from tests.parity.test_schedulers import BETAS, SEEDS, SHAPE, Double, config, network

CLASSES: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2s": DPMSolverSinglestepScheduler,
    "unipc": UniPCMultistepScheduler,
    "pndm": PNDMScheduler,
    "lcm": LCMScheduler,
}
TOLERANCE = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


@pytest.fixture(autouse=True)
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers count in float64, and draw noise in float32 as we do."""

    def draw(shape: Any, generator: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        return draw_noise(generator, shape[1:]).to(dtype)

    for scheduler in CLASSES.values():
        module = sys.modules[scheduler.__module__]
        monkeypatch.setattr(module, "torch", Double(torch))
        monkeypatch.setattr(module, "np", Double(np))
        monkeypatch.setattr(module, "randn_tensor", draw, raising=False)


def difference(sampler: str, scheduler: Any, plan: Plan, schedule: NoiseSchedule, first: int = 0) -> float:
    """Run both, from noise or after `first` of the scheduler's steps from an image: the largest difference of results.

    Args:
        scheduler: whose timesteps are set.
    """
    results = []
    for ours in (True, False):
        generators = [image_generator(seed) for seed in SEEDS]
        noise = draw_noise(generators, SHAPE).double()
        latents = torch.sin(torch.arange(noise.numel(), dtype=noise.dtype)).reshape(noise.shape) if first else None
        if ours:
            denoise = as_denoiser(
                lambda x, call: network(x, call.timesteps),
                schedule.prediction_type,
                thresholding=schedule.thresholding,
            )
            *_, final = sample(denoise, plan, start(plan, noise, latents), generators)
            results.append(final.x)
            continue
        timesteps = scheduler.timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = noise * scheduler.init_noise_sigma
        if latents is not None:
            x = scheduler.add_noise(latents, noise, timesteps[:1].repeat(len(noise)))
        options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for timestep in timesteps:
            output = network(scheduler.scale_model_input(x, timestep), timestep)
            x = scheduler.step(output, timestep, x, **options).prev_sample
        results.append(x)
    return float((results[0] - results[1]).abs().max() / results[1].abs().max().clamp(min=1))


@pytest.mark.parametrize("betas", list(BETAS))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_singlestep(betas: str, prediction_type: str, steps: int) -> None:
    values = config(betas, prediction_type)
    schedule, scheduler = NoiseSchedule(**values), DPMSolverSinglestepScheduler(**values, lower_order_final=True)
    scheduler.set_timesteps(steps)
    plan = make_plan(schedule, "dpmpp_2s", steps)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    assert difference("dpmpp_2s", scheduler, plan, schedule) < TOLERANCE


@pytest.mark.parametrize("strength", [0.3, 0.55, 0.9])
def test_singlestep_from_an_image(strength: float) -> None:
    """Pairs of steps are counted from the start of the whole run, so one may be cut."""
    values = config("scaled_linear")
    scheduler = DPMSolverSinglestepScheduler(**values, lower_order_final=True)
    scheduler.set_timesteps(20)
    plan = make_plan(NoiseSchedule(**values), "dpmpp_2s", 20, strength=strength)
    assert difference("dpmpp_2s", scheduler, plan, NoiseSchedule(**values), 20 - len(plan)) < TOLERANCE


@pytest.mark.parametrize("betas", list(BETAS))
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps", [10, 25])
def test_runge_kutta_start(betas: str, set_alpha_to_one: bool, steps: int) -> None:
    values = config(betas, set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    schedule, scheduler = NoiseSchedule(**values), PNDMScheduler(**values, skip_prk_steps=False)
    scheduler.set_timesteps(steps)
    plan = make_plan(schedule, "pndm", steps)
    assert plan.timesteps.tolist() == pytest.approx(scheduler.timesteps.tolist())
    assert difference("pndm", scheduler, plan, schedule) < TOLERANCE


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc", "dpmpp_2s"])
@pytest.mark.parametrize("spacing", ["", "_karras"])
def test_runs_that_stop_at_the_first_noise_level(sampler: str, spacing: str) -> None:
    values = config("scaled_linear", "v_prediction")
    more: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
    scheduler = CLASSES[sampler](**values, **more, use_karras_sigmas=bool(spacing))
    schedule = NoiseSchedule.from_dict(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    scheduler.set_timesteps(20)
    plan = make_plan(schedule, sampler + spacing, 20)
    if spacing and sampler != "euler":  # the last two levels are one there, and timesteps are cut and not rounded
        assert len(plan) == len(scheduler.timesteps)
        assert torch.isfinite(plan.matrices).all()
    else:
        assert difference(sampler, scheduler, plan, schedule) < TOLERANCE
    assert NoiseSchedule.from_dict(schedule.to_dict()).to_dict() == schedule.to_dict()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "unipc", "lcm"])
@pytest.mark.parametrize("largest", [1.0, 1.5])
def test_dynamic_thresholding(sampler: str, largest: float) -> None:
    values = config("scaled_linear", timestep_spacing="leading")
    if sampler == "ddpm":
        values["clip_sample"] = False
    more = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": largest}
    scheduler = CLASSES[sampler](**values, **more)
    schedule = NoiseSchedule.from_dict({"_class_name": type(scheduler).__name__, **values, **more})
    scheduler.set_timesteps(10)
    plan = make_plan(schedule, sampler, 10)
    assert difference(sampler, scheduler, plan, schedule) < (1e-4 if sampler == "lcm" else TOLERANCE)


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "dpmpp_2m", "dpmpp_2s", "lcm"])
@pytest.mark.parametrize("first", [0, 2])
def test_timesteps_by_hand(sampler: str, first: int) -> None:
    """Those of a published list for few steps; a strength leaves the first of them out."""
    chosen = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    values = config("scaled_linear", "v_prediction")
    if sampler == "lcm":
        chosen = [999, 759, 499, 259]
    more = {"lower_order_final": True} if sampler == "dpmpp_2s" else {}
    scheduler = CLASSES[sampler](**values, **({"clip_sample": False} if sampler == "ddpm" else more))
    scheduler.set_timesteps(timesteps=chosen)
    schedule = NoiseSchedule(**values, timestep_spacing="linspace" if sampler == "euler" else None)
    strength = 1 - first / len(chosen)
    plan = make_plan(schedule, sampler, timesteps=chosen, strength=strength)
    assert plan.timesteps.tolist() == chosen[first:]
    expected = 1e-4 if sampler == "lcm" else TOLERANCE
    assert difference(sampler, scheduler, plan, schedule, first) < expected
