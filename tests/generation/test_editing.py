"""Editing without training, as inputs of the pipeline: outpainting, resampling, variations, blends, inversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.diffusion import draw_noise, image_generator, slerp
from latentdiff.errors import InputError
from latentdiff.generation.result import read_record
from latentdiff.images import open_image, to_tensor
from latentdiff.models.unet import UNet2DConditionModel
from tests.models.tiny import noise_picture

STEPS = {"num_inference_steps": 3}
FOX = "the red fox"


def latents(pipe: Pipeline, prompt: str | Sequence[str] = FOX, **settings: Any) -> Tensor:
    return pipe(prompt, output_type="latent", **{**STEPS, **settings}).images


@pytest.fixture
def picture() -> Image.Image:
    return noise_picture(32, 32)


@pytest.fixture
def half_mask() -> Image.Image:
    """White on the right half of a 32 x 32 picture."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    return mask


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_schedule": "linear"},
        {"guidance_schedule": "cosine"},
        {"guidance_parallel": 0.0},
        {"guidance_limit": 0.5},
        {"sampler": "ddim", "eta": 1.0},
        {"resampling": 2},
        {"variation_strength": 0.2, "variation_seed": 9},
        {"blend_prompt": "cat", "blend": 0.5},
    ],
)
def test_every_setting_has_an_effect_and_is_recorded(pipe: Pipeline, change: dict[str, Any]) -> None:
    plain = {"sampler": change.get("sampler", "dpmpp_2m")}
    assert not torch.allclose(latents(pipe, **change), latents(pipe, **plain), atol=1e-4)
    record = pipe(FOX, **change, **STEPS).record(0)
    assert change.items() <= record.items()


def test_projected_guidance_without_its_means_is_classifier_free(pipe: Pipeline) -> None:
    limited = latents(pipe, guidance_limit=1e9, guidance_rescale=0.3)
    assert torch.allclose(limited, latents(pipe, guidance_rescale=0.3), atol=1e-4)


def test_slerp_keeps_the_length_of_noise() -> None:
    first, second = (draw_noise([image_generator(seed)], (4, 16, 16)) for seed in (0, 1))
    assert torch.allclose(slerp(first, second, 0.0), first, atol=1e-6)
    assert torch.allclose(slerp(first, second, 1.0), second, atol=1e-6)
    halfway = slerp(first, second, 0.5)
    assert float(halfway.norm()) == pytest.approx(float(first.norm() + second.norm()) / 2, rel=1e-3)
    assert torch.allclose(slerp(first, first, 0.3), first, atol=1e-5)


def test_variations_are_of_one_picture(pipe: Pipeline) -> None:
    base = latents(pipe, seed=3)
    result = pipe(FOX, seed=3, variation_strength=0.2, variation_seed=5, num_images=3, output_type="latent", **STEPS)
    assert result.seeds == [3, 3, 3]
    assert [result.record(index)["variation_seed"] for index in range(3)] == [5, 6, 7]
    far = latents(pipe, seed=3, variation_strength=1.0, variation_seed=5, sampler="dpmpp_2m")  # which draws no noise
    distances = (result.images - base).square().mean(dim=(1, 2, 3))
    assert 0 < float(distances.max()) < float((latents(pipe, seed=5) - base).square().mean())
    assert torch.allclose(far, latents(pipe, seed=5, sampler="dpmpp_2m"), atol=1e-4)
    alone = latents(pipe, seed=3, variation_strength=0.2, variation_seed=7)
    assert torch.allclose(alone[0], result.images[2], atol=1e-4)


def test_blend_goes_from_one_prompt_to_the_other(pipe: Pipeline) -> None:
    assert torch.allclose(latents(pipe, blend_prompt="cat", blend=0.0), latents(pipe), atol=1e-5)
    assert torch.allclose(latents(pipe, blend_prompt="cat", blend=1.0), latents(pipe, "cat"), atol=1e-5)
    long = "red fox " * 9  # of several windows
    assert torch.allclose(latents(pipe, "cat", blend_prompt=long, blend=1.0), latents(pipe, long), atol=1e-5)


def test_outpainting_keeps_the_picture_and_draws_around_it(pipe: Pipeline, picture: Image.Image) -> None:
    result = pipe(FOX, image=picture, outpaint={"left": 16, "bottom": 8}, **STEPS)
    (drawn,) = result.images
    assert drawn.size == (48, 40)
    before, after = np.asarray(picture, dtype=int), np.asarray(drawn, dtype=int)
    assert np.abs(after[:32, 16:] - before).max() <= 1
    assert np.abs(after[:, :16] - after[:1, :16]).mean() > 1
    record = result.record(0)
    assert record["outpaint"] == [16, 0, 0, 8] and (record["width"], record["height"]) == (32, 32)
    assert record["strength"] == 1.0


def test_outpainting_and_variations_are_replayed(built_model: Path, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "in.png")
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    call = ["generate", FOX, "--model", str(built_model), "--steps", "3", "-o", str(out)]
    assert main([*call, "--image", str(tmp_path / "in.png"), "--outpaint", "right=16, top=8"]) == 0
    assert open_image(out).size == (48, 40)
    assert main(["replay", str(out), "-o", str(again), "--model", str(built_model)]) == 0
    assert out.read_bytes() == again.read_bytes()
    pipe = Pipeline.from_pretrained(built_model, device="cpu")
    pipe(FOX, seed=3, variation_strength=0.4, variation_seed=5, num_images=3, **STEPS).save(tmp_path / "v.png")
    assert main(["replay", str(tmp_path / "v-3.png"), "-o", str(again), "--model", str(built_model)]) == 0
    assert (tmp_path / "v-3.png").read_bytes() == again.read_bytes()
    assert read_record(again)["variation_seed"] == 7


def test_resampled_inpainting_keeps_what_is_known(pipe: Pipeline, picture: Image.Image, half_mask: Image.Image) -> None:
    calls: list[int] = []
    options: dict[str, Any] = {
        "image": picture,
        "mask": half_mask,
        "callback": lambda i, n, x: calls.append(n),
        **STEPS,
    }
    drawn = pipe(FOX, resampling=4, **options).images[0]
    assert calls == [12] * 12
    before, after = np.asarray(picture, dtype=int), np.asarray(drawn, dtype=int)
    assert np.abs(after[:, :16] - before[:, :16]).max() <= 1
    assert not np.array_equal(after, np.asarray(pipe(FOX, **options).images[0]))


def test_inversion_finds_the_noise_of_a_picture(pipe: Pipeline, picture: Image.Image) -> None:
    """Drawn from the noise it was inverted to, a picture comes back; one step too few iterations, and it does not."""
    encoded = pipe.autoencoder.encode(to_tensor([picture])).mode() * pipe.autoencoder.config.scaling_factor
    errors = []
    for iterations in (1, 30):
        noise = pipe.invert(picture, FOX, num_inference_steps=20, iterations=iterations)
        assert noise.shape == (1, 4, 8, 8) and noise.dtype == torch.float32
        options: dict[str, Any] = {"sampler": "ddim", "guidance_scale": 1.0, "num_inference_steps": 20}
        errors.append(float((latents(pipe, latents=noise, **options) - encoded).abs().max()))
    assert errors[1] < 0.1 * errors[0]


def test_inversion_refuses_transparent_parts(pipe: Pipeline, picture: Image.Image, tmp_path: Path) -> None:
    clear = picture.convert("RGBA")
    clear.putpixel((3, 3), (0, 0, 0, 100))
    clear.save(tmp_path / "clear.png")
    for image in (clear, tmp_path / "clear.png"):
        with pytest.raises(InputError, match="image must be opaque here, got transparent parts"):
            pipe.invert(image, FOX)
    pipe.invert(picture.convert("RGBA"), FOX, num_inference_steps=2)  # an opaque alpha channel hides nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outpaint": {"left": 8}}, "outpaint says which part of an image is drawn anew, got no image"),
        (
            {"outpaint": {"left": 8}, "image": ..., "mask": ...},
            "outpaint makes its own mask, got a mask besides",
        ),
        ({"outpaint": {"lefft": 8}, "image": ...}, "outpaint has no side 'lefft'; did you mean 'left'"),
        ({"outpaint": {"left": 12}, "image": ...}, "outpaint left must be a multiple of 8, got 12; try 8 or 16"),
        ({"outpaint": {"left": -8}, "image": ...}, "outpaint left must be a whole number from 0"),
        ({"outpaint": {"left": 0}, "image": ...}, "outpaint must add pixels on some side"),
        ({"outpaint": 8, "image": ...}, "outpaint must be sides with pixels, got 8"),
        (
            {"outpaint": {"left": 800}, "image": ...},
            "width with outpaint must be a whole number from 8 to 128, got 832",
        ),
        ({"resampling": 0}, "resampling must be a whole number from 1 to 100"),
        ({"resampling": 2, "sampler": "heun"}, "resampling needs a sampler that calls the network once a step"),
        ({"eta": 0.5}, "eta is an option of ddim"),
        ({"eta": 1.5, "sampler": "ddim"}, "eta must be a finite number from 0 to 1"),
        ({"variation_strength": 1.5}, "variation_strength must be a finite number from 0 to 1"),
        ({"variation_seed": -1}, "variation_seed must be a whole number"),
        ({"blend": 0.5}, "blend says how far to go towards blend_prompt"),
        ({"blend": 2, "blend_prompt": "cat"}, "blend must be a finite number from 0 to 1"),
        ({"guidance_schedule": "linaer"}, "guidance_schedule 'linaer' is unknown; did you mean 'linear'"),
        ({"guidance_parallel": -1}, "guidance_parallel must be a finite number from 0 to 1"),
        ({"guidance_limit": 0.0}, "guidance_limit must be"),
        ({"clip_skip": 1}, "clip_skip is for CLIP text encoders, got BertModel; leave it out"),
        ({"clip_skip": -1}, "clip_skip must be a whole number from 0 to 24"),
        ({"sampler": EulerDiscreteScheduler(), "eta": 0.5}, "eta needs one of our samplers, got a scheduler object"),
        ({"sampler": EulerDiscreteScheduler(), "resampling": 2}, "resampling needs one of our samplers"),
    ],
)
def test_what_cannot_be_edited_is_refused(
    pipe: Pipeline, picture: Image.Image, half_mask: Image.Image, options: dict[str, Any], message: str
) -> None:
    given: dict[Any, Any] = {"image": picture, "mask": half_mask}
    with pytest.raises(InputError, match=message):
        pipe(FOX, **{name: given[name] if value is ... else value for name, value in options.items()})


@pytest.mark.parametrize("text", ["left", "left=x", "left=8,", "left=-8"])
def test_sides_that_are_none(built_model: Path, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    call = ["generate", "cat", "--model", str(built_model), "--image", str(tmp_path / "in.png"), "--outpaint", text]
    assert main(call) == 2
    assert "--outpaint must be sides with pixels" in capsys.readouterr().err


def test_networks_that_learn_their_variance_or_see_themselves(pipe: Pipeline) -> None:
    """Guidance is of the prediction alone, and each call is given the estimate of the one before."""
    config = replace(pipe.unet.config, in_channels=8, out_channels=8, self_conditioning=True)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(config).requires_grad_(False)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    schedule = replace(pipe.components.schedule, variance_type="learned_range")
    own = Pipeline(replace(pipe.components, unet=unet, schedule=schedule))
    plain = latents(own, sampler="ddpm", num_inference_steps=6)
    assert plain.shape == (1, 4, 8, 8)
    with torch.no_grad():
        unet.conv_out.bias[4:] += 3.0  # more noise
    assert not torch.allclose(latents(own, sampler="ddpm", num_inference_steps=6), plain)
    assert torch.allclose(latents(own, guidance_limit=1e9), latents(own), atol=1e-4)
    several = latents(own, num_images=3, sampler="dpmpp_2m", batch_size=2)
    assert torch.allclose(several[2:], latents(own, seed=2, sampler="dpmpp_2m"), atol=1e-4)
    with pytest.raises(InputError, match="this self-conditioned model needs one of our samplers"):
        own(FOX, sampler=EulerDiscreteScheduler.from_config(schedule.to_dict()))
