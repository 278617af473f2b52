"""Two passes: a picture drawn at its size, and its latents, made larger, drawn again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.diffusion import draw_noise, image_generator, make_plan, sample, start
from latentdiff.errors import InputError
from latentdiff.generation.result import read_record
from latentdiff.images import open_image, read_texts
from latentdiff.models.unet import UNet2DConditionModel
from tests.models.tiny import randomize

FOX = "the red fox"
STEPS: dict[str, Any] = {"num_inference_steps": 4}


def latents(pipe: Pipeline, **settings: Any) -> Tensor:
    return pipe(FOX, output_type="latent", **{**STEPS, **settings}).images


def test_the_second_pass_starts_from_the_first(pipe: Pipeline) -> None:
    """The same by hand: latents made larger, noise that the image's own generator draws next, half of the steps."""
    options: dict[str, Any] = {"sampler": "dpmpp_2m", "guidance_scale": 1.0, "seed": 5}
    drawn = latents(pipe, hires=2.0, hires_strength=0.5, **options)
    assert drawn.shape == (1, 4, 16, 16)
    generator = image_generator(5)
    draw_noise([generator], (4, 8, 8))
    noise = draw_noise([generator], (4, 16, 16))
    large = F.interpolate(latents(pipe, **options), (16, 16), mode="bicubic")
    plan = make_plan(pipe.components.schedule, "dpmpp_2m", 4, strength=0.5)
    context = pipe.components.prompt_encoder([FOX])[0].states.flatten(0, 1)[None]

    @torch.no_grad()
    def network(x: Tensor, call: Any) -> Tensor:
        return pipe.unet(x, call.timesteps, context)

    *_, step = sample(pipe.components.denoiser(network), plan, start(plan, noise, large), [generator])
    torch.testing.assert_close(drawn, step.x, atol=1e-4, rtol=1e-4)


def test_a_picture_stays_what_it_was_the_less_is_drawn_anew(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 1.0}
    base = F.interpolate(latents(pipe, **options), (12, 12), mode="bicubic")
    near, far = (latents(pipe, hires=1.5, hires_strength=strength, **options) for strength in (0.05, 1.0))
    assert (near - base).abs().mean() < 0.5 * (far - base).abs().mean()


@pytest.mark.parametrize("sampler", ["euler_a", "unipc"])
def test_images_are_their_own_in_both_passes(pipe: Pipeline, sampler: str) -> None:
    several = latents(pipe, hires=1.5, num_images=3, batch_size=2, seed=4, sampler=sampler)
    assert torch.allclose(several[2:], latents(pipe, hires=1.5, seed=6, sampler=sampler), atol=1e-4)
    assert not torch.allclose(several[:1], several[1:2], atol=1e-2)


def test_sizes_and_steps_are_counted(pipe: Pipeline) -> None:
    calls = list[tuple[int, int, int]]()
    result = pipe(
        FOX,
        height=24,
        width=40,
        hires=1.4,
        hires_strength=0.5,
        callback=lambda done, total, latents: calls.append((done, total, latents.shape[3])),
        **STEPS,
    )
    assert result.images[0].size == (56, 32)  # the nearest multiples of 8
    assert [call[:2] for call in calls] == [(step, 6) for step in range(1, 7)]
    assert [call[2] for call in calls] == [10] * 4 + [14] * 2
    record = result.record(0)
    assert (record["width"], record["height"], record["size"]) == (40, 24, [56, 32])
    assert (record["hires"], record["hires_strength"], record["strength"]) == (1.4, 0.5, 1.0)


def test_models_that_inpaint_draw_twice_too(pipe: Pipeline) -> None:
    unet = UNet2DConditionModel(replace(pipe.unet.config, in_channels=9)).requires_grad_(False)
    randomize(unet)
    own = Pipeline(replace(pipe.components, unet=unet))
    assert own(FOX, hires=2, **STEPS).images[0].size == (64, 64)


def test_both_passes_are_replayed(built_model: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    call = ["generate", FOX, "--model", str(built_model), "--steps", "4", "-n", "2", "-o", str(out)]
    assert main([*call, "--hires", "1.5", "--hires-strength", "0.6", "--seed", "3"]) == 0
    second = tmp_path / "out-2.png"
    assert open_image(second).size == (48, 48)
    assert read_record(second)["hires"] == 1.5
    assert (
        "Size: 32x32" in read_texts(second)["parameters"] and "Hires upscale: 1.5" in read_texts(second)["parameters"]
    )
    assert main(["replay", str(second), "-o", str(again), "--model", str(built_model)]) == 0
    assert second.read_bytes() == again.read_bytes()


def test_given_noise_is_that_of_the_first_pass(pipe: Pipeline) -> None:
    noise = draw_noise([image_generator(9)], (4, 8, 8))
    result = pipe(FOX, latents=noise, hires=2, **STEPS)
    assert result.settings["latents_given"] is True
    with pytest.raises(InputError, match=r"latents must have shape \(1, 4, 8, 8\), got \(1, 4, 16, 16\)"):
        pipe(FOX, latents=torch.zeros(1, 4, 16, 16), hires=2, **STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hires": 2, "image": Image.new("RGB", (32, 32))}, "hires draws from a prompt alone, and then larger, got an"),
        ({"hires": 4, "height": 40}, "height with hires must be a whole number from 8 to 128, got 160"),
        ({"hires": 5}, "hires must be a finite number from 1 to 4, got 5; try 2"),
        ({"hires": 2, "hires_strength": 0.0}, "strength must be a number above 0"),
        ({"hires": 2, "hires_strength": 0.1}, "strength must leave at least one of 4 steps"),
        ({"hires": 2, "height": 20}, "height must be a multiple of 8, got 20; try 16 or 24"),
    ],
)
def test_what_cannot_be_drawn_twice_is_refused(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(FOX, **options, **STEPS)


def test_an_option_alone_is_refused(built_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "fox", "--model", str(built_model), "--hires-strength", "0.5"]) == 2
    assert "got no --hires; add it" in capsys.readouterr().err
