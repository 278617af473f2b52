"""Inpainting networks (9 channels), tiny and with random weights, against diffusers' inpainting pipeline."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.models.unet import UNet2DConditionModel
from tests.checkpoints.test_single_file import components_of, tiny
from tests.models.tiny import noise_picture, randomize
from tests.parity.test_pipeline_clip import SAMPLERS


def take_modes(patch: pytest.MonkeyPatch) -> None:
    """Let pipelines take the most likely latents of a picture, as we do, where they draw some from the generator."""
    kinds = (
        diffusers.StableDiffusionImg2ImgPipeline,
        diffusers.StableDiffusionInpaintPipeline,
        diffusers.StableDiffusionXLInpaintPipeline,
    )
    for kind in kinds:
        module = sys.modules[kind.__module__]
        patch.setattr(module, "retrieve_latents", lambda encoded, *rest, **more: encoded.latent_dist.mode())


@pytest.fixture(autouse=True)
def modes(monkeypatch: pytest.MonkeyPatch) -> None:
    take_modes(monkeypatch)


@pytest.fixture(scope="module")
def model(built_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    components = load_pipeline(built_model)
    assert components.unet is not None and not isinstance(components.autoencoder.config, type(None))
    unet = UNet2DConditionModel(replace(components.unet.config, in_channels=9))
    randomize(unet)
    folder = tmp_path_factory.mktemp("inpaint") / "model"
    save_pipeline(replace(components, unet=unet), folder, dtype=None)
    return folder


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_same_picture_where_it_is_drawn(model: Path, sampler: str, strength: float) -> None:
    picture = noise_picture(32, 32)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    peer = diffusers.StableDiffusionInpaintPipeline.from_pretrained(
        model, torch_dtype=torch.float32, local_files_only=True
    )
    name, changes = SAMPLERS[sampler]
    peer.scheduler = getattr(diffusers, name).from_config(peer.scheduler.config, **changes)
    peer.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "strength": strength}
    generator = torch.Generator().manual_seed(5)
    expected = peer(
        "the red fox", image=picture, mask_image=mask, height=32, width=32, generator=generator, **options
    ).images[0]
    pipe = Pipeline.from_pretrained(model, device="cpu")
    drawn = pipe("the red fox", image=picture, mask=mask, seed=5, sampler=sampler, **options).images[0]
    ours, theirs, before = (np.asarray(one, dtype=int) for one in (drawn, expected, picture))
    assert np.abs(ours[:, 16:] - theirs[:, 16:]).max() <= 2
    assert np.abs(ours[:, :16] - before[:, :16]).max() <= 1


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_same_picture_by_xl(sampler: str) -> None:
    components = components_of(tiny("Stable Diffusion XL"), channels=9)
    autoencoder: Any = components.autoencoder
    autoencoder.decoder.conv_out.weight *= 5  # contrast
    peer = Pipeline(components).to_diffusers()
    name, changes = SAMPLERS[sampler]
    peer.scheduler = getattr(diffusers, name).from_config(peer.scheduler.config, **changes)
    peer.set_progress_bar_config(disable=True)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    picture = noise_picture(32, 32)
    options: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "strength": 1.0}
    generator = torch.Generator().manual_seed(5)
    expected = peer(
        "the red fox", image=picture, mask_image=mask, height=32, width=32, generator=generator, **options
    ).images[0]
    pipe = Pipeline(components)
    drawn = pipe("the red fox", image=picture, mask=mask, seed=5, sampler=sampler, **options).images[0]
    ours, theirs = (np.asarray(one, dtype=int) for one in (drawn, expected))
    assert np.abs(ours[:, 16:] - theirs[:, 16:]).max() <= 2


def test_without_an_image_everything_is_drawn(model: Path) -> None:
    pipe = Pipeline.from_pretrained(model, device="cpu")
    assert pipe("the red fox", num_inference_steps=3).images[0].size == (32, 32)
