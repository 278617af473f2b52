"""Inpainting with a network of 4 channels, against diffusers' inpainting pipeline: what is drawn and what is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.diffusion import NoiseSchedule
from tests.checkpoints.test_single_file import components_of, tiny
from tests.models.tiny import noise_picture
from tests.parity.test_pipeline_inpaint import take_modes

# Samplers that draw noise put fresh noise on what is kept, where diffusers repeats the first one: by design.
DETERMINISTIC = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    components = components_of(tiny("Stable Diffusion 1.x"))
    stable = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    schedule = NoiseSchedule(**stable, set_alpha_to_one=False)  # type: ignore[arg-type]
    return Pipeline(replace(components, schedule=schedule))


@pytest.fixture(scope="module")
def peer(pipe: Pipeline) -> Any:
    peer = diffusers.StableDiffusionInpaintPipeline(**pipe.to_diffusers().components, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    return peer


@pytest.mark.parametrize("sampler", list(DETERMINISTIC))
@pytest.mark.parametrize("strength", [0.4, 0.75])
def test_latents_are_the_same_in_and_outside_the_mask(
    pipe: Pipeline, peer: Any, sampler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the schedule ends at the first training noise level, as Stable Diffusion's own for ddim does."""
    take_modes(monkeypatch)
    peer.scheduler = getattr(diffusers, DETERMINISTIC[sampler]).from_config(pipe.components.schedule.to_dict())
    picture, mask = noise_picture(32, 32), Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    options: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "strength": strength}
    generator = torch.Generator().manual_seed(5)
    expected = peer(
        "a red fox",
        image=picture,
        mask_image=mask,
        height=32,
        width=32,
        generator=generator,
        output_type="latent",
        **options,
    ).images
    drawn = pipe("a red fox", image=picture, mask=mask, seed=5, sampler=sampler, output_type="latent", **options).images
    torch.testing.assert_close(drawn, expected, atol=2e-4, rtol=1e-4)
