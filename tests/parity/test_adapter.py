"""Schedulers of diffusers as samplers: what one of them draws is what our table of its name draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from latentdiff import Pipeline
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
    assert seen == [(done, 4, (1, 4, 16, 16)) for done in (1, 2, 3, 4)]
    assert given.settings["sampler"] == "diffusers:EulerDiscreteScheduler"
    assert scheduler.num_inference_steps is None  # the user's own object is as it was


def test_schedulers_of_another_model_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"for epsilon, the model predicts v_prediction; make it with DDIM"):
        pipe("a red fox", sampler=DDIMScheduler())
    with pytest.raises(InputError, match="another noise schedule than the model"):
        pipe("a red fox", sampler=DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(InputError, match="sampler must be a name or a diffusers scheduler, got int"):
        pipe("a red fox", sampler=3)
    with pytest.raises(InputError, match="only Python can pass again"):
        pipe("a red fox", sampler="diffusers:EulerDiscreteScheduler")
