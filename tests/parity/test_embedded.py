"""The embedded model is an ordinary diffusers model: the same latents and settings give the same picture there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.checkpoints import embedded_model
from latentdiff.diffusion import draw_noise, image_generator

LORA = Path(__file__).parents[2] / "assets" / "fxemoji-lora.safetensors"
SCHEDULERS = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}


@pytest.fixture(scope="module")
def pipes():  # type: ignore[no-untyped-def]
    import diffusers

    folder = embedded_model()
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    return Pipeline.from_pretrained(folder), peer


def test_the_shipped_lora_draws_the_same_there(pipes) -> None:  # type: ignore[no-untyped-def]
    import diffusers

    pytest.importorskip("peft")
    ours, peer = pipes
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    noise = draw_noise([image_generator(7)], (4, 16, 16))
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


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
def test_picture_is_the_one_diffusers_draws(pipes, sampler: str) -> None:  # type: ignore[no-untyped-def]
    import diffusers

    ours, peer = pipes
    peer.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(peer.scheduler.config)
    noise = draw_noise([image_generator(7)], (4, 16, 16))
    settings = {"num_inference_steps": 10, "guidance_scale": 4.0}
    mine = ours("a red fox", sampler=sampler, latents=noise, **settings).images[0]
    theirs = peer("a red fox", latents=noise.clone(), **settings).images[0]
    difference = np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int))
    assert difference.max() <= 2
