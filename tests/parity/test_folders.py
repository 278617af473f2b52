"""Folders of ours in diffusers with no further argument, by the very lines that the cards show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints import embedded_model, load_pipeline, save_pipeline
from latentdiff.diffusion import draw_noise, image_generator
from tests.models.tiny import noise_picture

ASSETS = Path(__file__).parents[2] / "assets"


def differences(ours: Image.Image, theirs: Image.Image) -> int:
    return int(np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max())


def test_the_embedded_model_draws_without_a_dtype() -> None:
    peer = diffusers.StableDiffusionPipeline.from_pretrained(embedded_model(), local_files_only=True)
    assert {peer.unet.dtype, peer.vae.dtype, peer.text_encoder.dtype} == {torch.float32}
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    noise = draw_noise([image_generator(7)], (peer.vae.config.latent_channels, 16, 16))
    options: dict[str, Any] = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 4.0}
    theirs = peer("a red fox", **options).images[0]
    ours = Pipeline.from_pretrained()("a red fox", sampler="ddim", **options).images[0]
    assert differences(ours, theirs) <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folders_in_half_precision_draw_without_a_dtype(built_model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    save_pipeline(load_pipeline(built_model), tmp_path / "half", dtype)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "half", local_files_only=True)
    peer.set_progress_bar_config(disable=True)
    assert peer.text_encoder.dtype == torch.float32
    assert peer("cat", num_inference_steps=2, height=32, width=32, output_type="latent").images.isfinite().all()
    half = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "half", local_files_only=True, torch_dtype=torch.float16
    )
    assert half.text_encoder.dtype == torch.float16


@pytest.mark.parametrize("name", ["emoji-inpaint", "emoji-upscale"])
def test_what_the_cards_of_variants_show(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ASSETS.parent)
    (lines,) = re.findall(r"```python\n(.*?)```", (ASSETS / name / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {"diffusers": diffusers}
    exec(lines, found)  # noqa: S102  the lines of our own card
    peer, size = found["pipe"], 32 if "inpaint" in name else 16
    peer.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"image": noise_picture(size, size), "num_inference_steps": 2, "output_type": "pt"}
    if "inpaint" in name:
        given |= {"mask_image": Image.new("L", (size, size), 255), "height": size, "width": size}
    assert peer("a fox", **given).images.isfinite().all()
