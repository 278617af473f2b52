"""Models distilled to few steps (latent consistency, Turbo, Lightning), tiny and with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.diffusion import NoiseSchedule
from latentdiff.models.unet import UNet2DConditionModel
from tests.models.tiny import randomize

STABLE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def build(base: Path, folder: Path, schedule: NoiseSchedule, **changes: Any) -> tuple[Pipeline, Any]:
    """The same model for us and for diffusers, with the scheduler that its folder names."""
    components = load_pipeline(base)
    assert components.unet is not None
    unet = UNet2DConditionModel(replace(components.unet.config, **changes))
    randomize(unet)
    save_pipeline(replace(components, unet=unet, schedule=schedule), folder, dtype=None)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    peer.set_progress_bar_config(disable=True)
    return Pipeline.from_pretrained(folder, device="cpu"), peer


@pytest.mark.parametrize("guidance_scale", [1.0, 8.5])
def test_consistency_model_embeds_the_guidance_scale(built_model: Path, tmp_path: Path, guidance_scale: float) -> None:
    """One call of the network a step, whatever the scale; and the noise of its sampler from the same seed."""
    schedule = NoiseSchedule(**STABLE, class_name="LCMScheduler", steps_offset=1, set_alpha_to_one=True)
    pipe, peer = build(built_model, tmp_path / "lcm", schedule, time_cond_proj_dim=32)
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "output_type": "pt"}
    expected = peer("the red fox", height=32, width=32, generator=torch.Generator().manual_seed(3), **settings).images
    drawn = pipe("the red fox", seed=3, sampler="lcm", **settings).images
    assert (drawn - expected).abs().max() <= 2 / 255
    other = pipe("the red fox", seed=3, sampler="lcm", **{**settings, "guidance_scale": 4.0}).images
    assert not torch.allclose(drawn, other, atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "steps", "class_name"),
    [("euler_a", 1, "EulerAncestralDiscreteScheduler"), ("euler", 4, "EulerDiscreteScheduler")],
)
def test_adversarially_distilled_models_start_at_the_last_timestep(
    built_model: Path, tmp_path: Path, sampler: str, steps: int, class_name: str
) -> None:
    """Turbo draws in one step of Euler ancestral, Lightning in four of Euler, both with trailing spacing, unguided."""
    schedule = NoiseSchedule(**STABLE, class_name=class_name, timestep_spacing="trailing", steps_offset=1)
    pipe, peer = build(built_model, tmp_path / "turbo", schedule)
    settings: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
    generator = torch.Generator().manual_seed(3)
    expected = peer("the red fox", height=32, width=32, guidance_scale=0.0, generator=generator, **settings).images
    drawn = pipe("the red fox", seed=3, sampler=sampler, guidance_scale=1.0, **settings).images
    assert (drawn - expected).abs().max() <= 2 / 255
