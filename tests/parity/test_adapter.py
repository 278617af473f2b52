"""Schedulers of diffusers as samplers: what one of them draws is what our table of its name draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from latentdiff import Pipeline
from latentdiff.diffusion import NoiseSchedule, SchedulerPlan
from latentdiff.errors import InputError


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained()


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", DDIMScheduler),
        ("euler", EulerDiscreteScheduler),
        ("euler_a", EulerAncestralDiscreteScheduler),
        ("dpmpp_2m", DPMSolverMultistepScheduler),
    ],
)
def test_scheduler_draws_what_the_table_draws(pipe: Pipeline, sampler: str, scheduler: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 10, "num_images": 2, "seed": 3, "output_type": "latent"}
    theirs = scheduler.from_config(pipe.components.schedule.to_dict())
    with torch.no_grad():
        ours, given = (pipe("a red fox", sampler=one, **options).images for one in (sampler, theirs))
    torch.testing.assert_close(given, ours, atol=1e-2, rtol=0)


def test_image_to_image_and_callbacks_work_too(pipe: Pipeline, tmp_path: Path) -> None:
    picture = pipe("a red fox", num_inference_steps=5).images[0]
    scheduler, seen = EulerDiscreteScheduler.from_config(pipe.components.schedule.to_dict()), []

    def callback(done: int, total: int, denoised: torch.Tensor) -> None:
        seen.append((done, total, tuple(denoised.shape)))

    options: dict[str, Any] = {"image": picture, "strength": 0.5, "num_inference_steps": 8, "output_type": "latent"}
    given = pipe("a red car", sampler=scheduler, callback=callback, **options)
    torch.testing.assert_close(given.images, pipe("a red car", sampler="euler", **options).images, atol=2e-3, rtol=0)
    assert seen == [(done, 4, tuple(given.images.shape)) for done in (1, 2, 3, 4)]
    assert given.settings["sampler"] == "diffusers:EulerDiscreteScheduler"
    assert scheduler.num_inference_steps is None  # the user's own object is as it was


OF_EMBEDDED = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
OTHER_PROCESSES = [
    (diffusers.CMStochasticIterativeScheduler(), "it has no alphas_cumprod"),
    (diffusers.IPNDMScheduler(), "it has no alphas_cumprod"),
    (diffusers.EDMEulerScheduler(), "it has no alphas_cumprod"),
    (diffusers.EDMDPMSolverMultistepScheduler(), "it has no alphas_cumprod"),
    (diffusers.FlowMatchEulerDiscreteScheduler(), "it has no alphas_cumprod"),
    (diffusers.FlowMatchHeunDiscreteScheduler(), "it has no alphas_cumprod"),
    (diffusers.DPMSolverMultistepScheduler(**OF_EMBEDDED, use_flow_sigmas=True), "use_flow_sigmas is True"),
    (diffusers.EulerDiscreteScheduler(**OF_EMBEDDED, timestep_type="continuous"), "timestep_type is 'continuous'"),
    (diffusers.RePaintScheduler(beta_schedule="squaredcos_cap_v2"), "needs original_image, mask at each step"),
    (diffusers.DDIMInverseScheduler(**OF_EMBEDDED), "leads from data to noise, its timesteps rise"),
    (diffusers.DPMSolverMultistepInverseScheduler(**OF_EMBEDDED), "leads from data to noise, its timesteps rise"),
]


@pytest.mark.parametrize(("scheduler", "cause"), OTHER_PROCESSES)
def test_schedulers_of_another_noise_process_are_refused(scheduler: Any, cause: str) -> None:
    """Before the first step, whatever the number of steps, in one line that names the class."""
    schedule = NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    for steps in (1, 10):
        with pytest.raises(InputError, match=cause) as caught:
            SchedulerPlan(scheduler, schedule, steps)
        assert type(scheduler).__name__ in str(caught.value) and len(str(caught.value)) < 200


def test_flow_matching_objects_are_refused_with_a_sampler_that_does_the_same() -> None:
    schedule = NoiseSchedule(beta_schedule="flow", prediction_type="flow_prediction")
    with pytest.raises(InputError, match=r"another noise process than the model .*; try sampler 'euler'"):
        SchedulerPlan(diffusers.FlowMatchEulerDiscreteScheduler(), schedule, 10)


def test_steps_that_a_scheduler_cannot_take_are_refused(pipe: Pipeline) -> None:
    scheduler = diffusers.LCMScheduler.from_config(pipe.components.schedule.to_dict())
    with pytest.raises(InputError, match="LCMScheduler cannot take 60 steps"):
        SchedulerPlan(scheduler, pipe.components.schedule, 60)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers takes numpy's functions of tensors
@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler", "SASolverScheduler"])
def test_other_schedulers_of_the_same_process_are_taken(pipe: Pipeline, name: str) -> None:
    scheduler = getattr(diffusers, name).from_config(pipe.components.schedule.to_dict())
    for steps in (4, 10):  # PNDM starts with three steps of Runge-Kutta
        assert len(SchedulerPlan(scheduler, pipe.components.schedule, steps)) >= steps


def test_schedulers_of_another_model_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"for epsilon, the model predicts v_prediction; make it with DDIM"):
        pipe("a red fox", sampler=DDIMScheduler())
    with pytest.raises(InputError, match="another noise schedule than the model"):
        pipe("a red fox", sampler=DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(InputError, match="sampler must be a name or a diffusers scheduler, got int"):
        pipe("a red fox", sampler=3)
    with pytest.raises(InputError, match="only Python can pass again"):
        pipe("a red fox", sampler="diffusers:EulerDiscreteScheduler")
