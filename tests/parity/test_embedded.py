"""The embedded model is an ordinary diffusers model: the same latents and settings give the same picture there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints import embedded_model
from latentdiff.diffusion import draw_noise, image_generator
from latentdiff.images import open_image
from tests.parity.test_pipeline_inpaint import take_modes

ASSETS = Path(__file__).parents[2] / "assets"
LORA, DRAWING = ASSETS / "fxemoji-lora.safetensors", ASSETS / "sample" / "emojione--banana.png"
SCHEDULERS = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}


@pytest.fixture(scope="module")
def pipes():  # type: ignore[no-untyped-def]
    import diffusers

    folder = embedded_model()
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    return Pipeline.from_pretrained(folder), peer


def noise_for(pipe: Pipeline) -> Tensor:
    return draw_noise([image_generator(7)], (pipe.components.autoencoder.config.latent_channels, 16, 16))


def test_the_shipped_lora_draws_the_same_there(pipes) -> None:  # type: ignore[no-untyped-def]
    import diffusers

    pytest.importorskip("peft")
    ours, peer = pipes
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    noise = noise_for(ours)
    settings = {"num_inference_steps": 10, "guidance_scale": 4.0}
    prompt = "a fox, firefox style"
    plain = ours(prompt, sampler="ddim", latents=noise, **settings).images[0]
    mine = ours.with_loras({LORA: 0.8})(prompt, sampler="ddim", latents=noise, **settings).images[0]
    peer.load_lora_weights(str(LORA.parent), weight_name=LORA.name, adapter_name="style")
    peer.set_adapters("style", 0.8)
    try:
        theirs = peer(prompt, latents=noise.clone(), **settings).images[0]
    finally:
        peer.unload_lora_weights()
    first, second, without = (np.asarray(one, dtype=int) for one in (mine, theirs, plain))
    assert np.abs(first - second).max() <= 2
    assert np.abs(first - without).mean() > 5


def test_the_shipped_upscaler_draws_the_same_there() -> None:
    import diffusers

    pipe = Pipeline.from_pretrained("embedded-upscale", device="cpu")
    peer = pipe.to_diffusers()
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    small = open_image(DRAWING).resize((32, 32), Image.Resampling.LANCZOS)
    settings: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "noise_level": 20}
    theirs = peer("a banana", image=small, generator=image_generator(5), **settings).images[0]
    ours = pipe("a banana", image=small, seed=5, sampler="ddim", correction="none", **settings).images[0]
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 2
    again = np.asarray(ours.resize(small.size, Image.Resampling.LANCZOS), dtype=int)
    assert np.abs(again - np.asarray(small, dtype=int)).mean() < 8


def test_the_shipped_inpainting_model_draws_the_same_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    take_modes(monkeypatch)
    pipe = Pipeline.from_pretrained("embedded-inpaint", device="cpu")
    peer = pipe.to_diffusers()
    assert isinstance(peer, diffusers.StableDiffusionInpaintPipeline)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    picture, mask = open_image(DRAWING), Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    settings: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "height": 64, "width": 64}
    given: dict[str, Any] = {"image": picture, "strength": 1.0, "generator": image_generator(5)}
    theirs = peer("a banana", mask_image=mask, **given, **settings).images[0]
    ours = pipe("a banana", image=picture, mask=mask, seed=5, sampler="ddim", **settings).images[0]
    one, other, before = (np.asarray(drawn, dtype=int) for drawn in (ours, theirs, picture))
    assert np.abs(one[:, 32:] - other[:, 32:]).max() <= 2
    assert np.array_equal(one[:, :32], before[:, :32])


def test_image_to_image_draws_the_same_there(pipes, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    import diffusers

    take_modes(monkeypatch)
    ours, _ = pipes
    peer = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(embedded_model())
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    picture = open_image(DRAWING).resize(ours.components.native_size)
    settings: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "strength": 0.6, "image": picture}
    theirs = peer("a red apple", generator=image_generator(5), **settings).images[0]
    mine = ours("a red apple", seed=5, sampler="ddim", **settings).images[0]
    assert np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 2


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
def test_picture_is_the_one_diffusers_draws(pipes, sampler: str) -> None:  # type: ignore[no-untyped-def]
    import diffusers

    ours, peer = pipes
    peer.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(peer.scheduler.config)
    noise = noise_for(ours)
    settings = {"num_inference_steps": 10, "guidance_scale": 4.0}
    mine = ours("a red fox", sampler=sampler, latents=noise, **settings).images[0]
    theirs = peer("a red fox", latents=noise.clone(), **settings).images[0]
    difference = np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int))
    assert difference.max() <= 2
