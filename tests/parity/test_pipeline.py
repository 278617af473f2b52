"""The same folder, latents and settings draw the same picture in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff import Pipeline

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


def theirs(folder: Path, sampler: str) -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    scheduler = getattr(diffusers, SCHEDULERS[sampler])
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def largest_difference(ours: Pipeline, peer: Any, prompt: str, sampler: str, **settings: Any) -> int:
    """Return the largest difference of any channel of any pixel, of 255."""
    height, width = ours.native_size
    factor = ours.autoencoder.config.downsample_factor
    shape = (2, ours.autoencoder.config.latent_channels, height // factor, width // factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # Where the steps do not divide 1000, diffusers' DDIM jumps to other noise levels than it tells the network next.
    steps = {} if {"timesteps", "sigmas"} & settings.keys() else {"num_inference_steps": 8}
    settings = {**steps, "guidance_scale": 4.0, **settings}
    mine = ours(prompt, sampler=sampler, latents=latents, num_images=2, **settings).images
    other = peer(prompt, latents=latents, num_images_per_prompt=2, height=height, width=width, **settings).images
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(mine, other))


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_same_picture(pipe: Pipeline, built_model: Path, sampler: str) -> None:
    peer = theirs(built_model, sampler)
    assert largest_difference(pipe, peer, "the red fox", sampler, negative_prompt="cat") <= 2
    assert largest_difference(pipe, peer, "the red fox", sampler, guidance_rescale=0.7) <= 2
    assert largest_difference(pipe, peer, "the red fox", sampler, guidance_scale=1.0) <= 2


@pytest.mark.parametrize(
    ("sampler", "levels"),
    [
        ("dpmpp_2m", {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}),  # published for ten steps
        ("euler", {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}),
        ("euler", {"sigmas": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]}),
    ],
)
def test_same_picture_with_steps_by_hand(
    pipe: Pipeline, built_model: Path, sampler: str, levels: dict[str, list[float]]
) -> None:
    assert largest_difference(pipe, theirs(built_model, sampler), "the red fox", sampler, **levels) <= 2


def test_pictures_depend_on_prompt_and_noise(pipe: Pipeline) -> None:
    """Guards the test above: it would pass for networks whose output is always the same."""
    first, second = pipe("the red fox", num_images=2, num_inference_steps=6, output_type="pt").images
    other = pipe("cat", num_inference_steps=6, output_type="pt").images[0]
    assert (first - second).abs().max() > 0.1
    assert (first - other).abs().max() > 0.02
