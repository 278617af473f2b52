"""The x4 upscaler (7 channels, noise level as a class), tiny and with random weights, against diffusers' pipeline."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError, ModelConfigError
from latentdiff.models.unet import UNet2DConditionModel
from tests.models.tiny import noise_picture, randomize

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
NOISING: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}


@pytest.fixture(scope="module")
def model(built_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    components = load_pipeline(built_model)
    assert components.unet is not None
    changes: dict[str, Any] = {"in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": (True, False)}
    unet = UNet2DConditionModel(replace(components.unet.config, **changes))
    randomize(unet)
    autoencoder: Any = copy.deepcopy(components.autoencoder)
    autoencoder.config = replace(autoencoder.config, scaling_factor=0.08333)  # diffusers insists on it
    schedule = NoiseSchedule(**NOISING, prediction_type="v_prediction", steps_offset=1, timestep_spacing="leading")
    low = NoiseSchedule(**NOISING, class_name="DDPMScheduler")
    folder = tmp_path_factory.mktemp("upscale") / "model"
    changed = replace(components, unet=unet, autoencoder=autoencoder, schedule=schedule, low_res_schedule=low)
    save_pipeline(changed, folder, dtype=None)
    return folder


@pytest.mark.parametrize("size", [(8, 8), (20, 12)])
@pytest.mark.parametrize("sampler", list(SCHEDULERS))
def test_same_picture_from_the_same_seed(model: Path, sampler: str, size: tuple[int, int]) -> None:
    """Both draw the noise on the small picture, then the first noise, then that of the sampler, from one generator."""
    picture = noise_picture(*size)
    peer = diffusers.StableDiffusionUpscalePipeline.from_pretrained(
        model, torch_dtype=torch.float32, local_files_only=True
    )
    name, options = SCHEDULERS[sampler]
    peer.scheduler = getattr(diffusers, name).from_config(peer.scheduler.config, **options)
    peer.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "noise_level": 40, "output_type": "pt"}
    generator = torch.Generator().manual_seed(5)
    expected = peer("the red fox", image=picture, negative_prompt="cat", generator=generator, **settings).images
    pipe = Pipeline.from_pretrained(model, device="cpu")
    drawn = pipe("the red fox", image=picture, negative_prompt="cat", seed=5, sampler=sampler, **settings).images
    assert drawn.shape[2:] == (4 * size[1], 4 * size[0])
    assert (drawn - expected).abs().max() <= 2 / 255
    assert drawn.std() > 0.04


def test_picture_and_noise_level_have_a_say(model: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(model, device="cpu")
    picture, other = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    settings: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    first = pipe("cat", image=picture, **settings).images
    for changed in ({"image": other}, {"image": picture, "noise_level": 200}):
        assert not torch.allclose(pipe("cat", **changed, **settings).images, first, atol=1e-4)
    both = pipe(["cat", "cat"], image=picture, **settings).images
    torch.testing.assert_close(both[:1], first)
    save_pipeline(load_pipeline(model), tmp_path / "again", dtype=None)
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        assert (tmp_path / "again" / file.relative_to(model)).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "draws a picture 4 times as large, got no image"),
        ({"mask": Image.new("L", (8, 8), 255)}, "4 times as large, got a mask"),
        ({"strength": 0.5}, "got strength"),
        ({"height": 64}, "got height other than 32"),
        ({"feather": 2}, "got feather"),
        ({"hires": 2}, "got hires"),
        ({"scale": 3}, "scale must be 2 or 4"),
        ({"image": Image.new("RGB", (8192, 2048))}, "the picture would have more than 64 megapixels, got 8192x2048"),
        ({"noise_level": 351}, "noise_level must be a whole number from 0 to 350"),
    ],
)
def test_bad_input(model: Path, options: dict[str, Any], message: str) -> None:
    pipe = Pipeline.from_pretrained(model, device="cpu")
    with pytest.raises(InputError, match=message):
        pipe("cat", num_inference_steps=2, **{"image": Image.new("RGB", (8, 8)), **options})
    with pytest.raises(InputError, match="got a model that enlarges"):
        pipe.invert(Image.new("RGB", (8, 8)), "cat")


def test_a_network_without_noise_levels_is_refused(model: Path, tmp_path: Path) -> None:
    components = load_pipeline(model)
    assert components.unet is not None
    unet = UNet2DConditionModel(replace(components.unet.config, num_class_embeds=None))
    save_pipeline(replace(components, unet=unet), tmp_path / "model", dtype=None)
    with pytest.raises(ModelConfigError, match="needs num_class_embeds"):
        load_pipeline(tmp_path / "model")
