"""Stable Diffusion 1.x and 2.x, tiny, with random weights and their own vocabulary: the same picture in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.checkpoints import save_pipeline
from tests.checkpoints.test_single_file import components_of, tiny

pytestmark = pytest.mark.long

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}


@pytest.fixture(scope="module", params=["Stable Diffusion 1.x", "Stable Diffusion 2.x"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "model"
    save_pipeline(components_of(tiny(request.param)), folder, dtype=None)
    return folder


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_same_picture_from_the_same_seed(model: Path, sampler: str, clip_skip: int) -> None:
    """Both draw the first noise and that of the sampler from one generator on the CPU."""
    name, options = SAMPLERS[sampler]
    peer = diffusers.StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, local_files_only=True)
    peer.scheduler = getattr(diffusers, name).from_config(peer.scheduler.config, **options)
    peer.set_progress_bar_config(disable=True)
    # Where it skips layers it looks for a part that transformers 5 no longer has.
    peer.text_encoder.__dict__.setdefault("text_model", peer.text_encoder)
    settings: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "height": 32, "width": 32}
    settings |= {"negative_prompt": "a blurry cat", "output_type": "pt"}
    generator = torch.Generator().manual_seed(11)
    expected = peer("a photo of a red fox", generator=generator, clip_skip=clip_skip or None, **settings).images
    pipe = Pipeline.from_pretrained(model, device="cpu")
    drawn = pipe("a photo of a red fox", seed=11, sampler=sampler, clip_skip=clip_skip, **settings).images
    assert (drawn - expected).abs().max() <= 2 / 255
    assert drawn.std() > 0.04
