"""A served picture is the one that the pipeline draws alone, whatever is drawn beside it.

To the bit where an image has its calls of the U-Net to itself. Where calls are joined, kernels add in another order, so
it is to rounding: one of 255 levels at most in a picture, and 1e-4 in latents (float32).
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.cli import main
from latentdiff.diffusion import NoiseSchedule
from latentdiff.engine.joined_calls import JoinedUNet, text_shape
from latentdiff.generation.result import read_record
from latentdiff.images import open_image
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from latentdiff.serve.scheduler import Scheduler
from tests.checkpoints.test_lora import lora_of
from tests.models.tiny import UNETS, noise_picture, randomize

LONG = "red fox " * 9  # two windows of text
HALF = (16, 0, 32, 32)  # a mask


def requests() -> list[dict[str, Any]]:
    """Requests of every kind that is drawn in steps."""
    photo, small = noise_picture(32, 32), noise_picture(40, 20, seed=1)
    return [
        {"prompt": "the red fox", "seed": 1},
        {"prompt": "cat", "seed": 2, "sampler": "dpmpp_2m", "num_inference_steps": 9},
        {"prompt": "cat", "seed": 3, "sampler": "heun", "guidance_scale": 1.0},
        {"prompt": LONG, "seed": 4, "sampler": "unipc", "negative_prompt": "cat"},
        {"prompt": "the fox", "seed": 5, "sampler": "dpmpp_3m_sde_karras", "num_inference_steps": 8},
        {"prompt": "the fox", "seed": 6, "guidance_interval": (0.2, 3.0), "num_inference_steps": 7},
        {"prompt": "fox", "seed": 7, "width": 48, "guidance_rescale": 0.7},
        {"prompt": "fox", "seed": 8, "width": 48, "sampler": "lms", "guidance_schedule": "cosine"},
        {"prompt": ["cat", "red fox"], "seed": 9, "num_images": 2, "sampler": "dpmpp_sde"},
        {"prompt": "cat", "seed": 10, "image": photo, "strength": 0.6},
        {"prompt": "cat", "seed": 11, "image": small, "strength": 0.9, "sampler": "ddim", "eta": 0.5},
        {"prompt": "cat", "seed": 12, "image": photo, "mask": HALF},
        {"prompt": "cat", "seed": 13, "image": photo, "mask": HALF, "strength": 0.7, "feather": 3, "sampler": "ddpm"},
        {"prompt": "cat", "seed": 14, "image": photo, "mask": HALF, "resampling": 2},
        {"prompt": "cat", "seed": 15, "image": photo, "outpaint": (8, 0, 0, 8)},
        {"prompt": "red fox", "seed": 16, "hires": 1.5, "sampler": "dpmpp_2m", "num_inference_steps": 6},
        {"prompt": "red fox", "seed": 17, "variation_strength": 0.4, "variation_seed": 3, "num_images": 2},
        {"prompt": "red fox", "seed": 18, "blend_prompt": "cat", "blend": 0.5, "guidance_parallel": 0.0},
        {"prompt": "red fox", "seed": 19, "guidance_limit": 5.0, "sampler": "deis"},
        {"prompt": "red fox", "seed": 25, "deep_every": 2, "num_images": 2},
        {"prompt": "", "seed": 20, "sampler": "lcm", "num_inference_steps": 4},
        {"prompt": "cat", "seed": 21, "sigmas": (20.0, 3.0, 0.4), "sampler": "euler"},
        {"prompt": "cat", "seed": 22, "sampler": "plms", "num_inference_steps": 1},
        {"prompt": "(red:1.4) fox", "seed": 23, "sampler": "dpm2_a", "num_inference_steps": 12},
        {"prompt": "cat", "seed": 24, "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))},
    ]


def many(count: int) -> list[dict[str, Any]]:
    """Return so many requests, of every kind in turn, none twice with the same seed."""
    kinds = [with_steps(request) for request in requests()]
    return [{**kinds[n % len(kinds)], "seed": n + 1} for n in range(count)]


def with_steps(request: dict[str, Any]) -> dict[str, Any]:
    given = "num_inference_steps" in request or "sigmas" in request
    return request if given else {**request, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> list[list[Image.Image]]:
    """The pictures of all requests, each image in a batch of its own."""
    return [pipe(**request, batch_size=1).images for request in many(64)]


def difference(first: Image.Image, second: Image.Image) -> int:
    """Return by how many of 255 levels two pictures differ at most."""
    assert (first.size, first.mode) == (second.size, second.mode)
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


@pytest.mark.parametrize("order", [0, 1])
def test_pictures_are_those_that_are_drawn_alone(pipe: Pipeline, alone: list[list[Image.Image]], order: int) -> None:
    """64 requests of every kind at once, at any times and in any order: at most 1 of 255 levels apart."""
    chance, numbered = random.Random(order), list(enumerate(many(64)))
    chance.shuffle(numbered)
    with Scheduler(pipe, batch=5) as scheduler:
        jobs = {}
        for number, request in numbered:
            jobs[number] = scheduler.submit(client=str(number % 3), **request)
            time.sleep(chance.choice([0, 0, 0.02]))
        results = {number: job.result(60) for number, job in jobs.items()}
        assert scheduler.stats().batch_fill > 0.5  # they were drawn together
    for number, result in results.items():
        assert max(difference(*both) for both in zip(result.images, alone[number], strict=True)) <= 1, number
        records = [result.record(index) for index in range(len(result.images))]
        assert {(record["batch_size"], record["batch_index"]) for record in records} == {(1, 0)}


def test_latents_agree_to_rounding(pipe: Pipeline) -> None:
    several = [{"prompt": "the red fox", "seed": seed, "num_inference_steps": 4 + seed} for seed in range(6)]
    with Scheduler(pipe, batch=6) as scheduler:
        jobs = [scheduler.submit(output_type="latent", **request) for request in several]
        drawn = [job.result(60).images for job in jobs]
    for request, latents in zip(several, drawn):
        assert torch.allclose(latents, pipe(output_type="latent", **request).images, rtol=0, atol=1e-4)


def test_an_image_with_calls_of_its_own_is_the_same_to_the_bit(pipe: Pipeline, alone: list[list[Image.Image]]) -> None:
    """In a scheduler of one place, or beside images of other shapes."""
    with Scheduler(pipe, batch=1) as scheduler:
        jobs = [scheduler.submit(**request) for request in many(24)[::3]]
        for job, expected in zip(jobs, alone[:24:3], strict=True):
            assert [difference(*both) for both in zip(job.result(60).images, expected, strict=True)] == [0] * job.count
    sizes = [{"prompt": "cat", "width": width, "output_type": "latent", "num_inference_steps": 4} for width in (16, 32)]
    with Scheduler(pipe) as scheduler:
        jobs = [scheduler.submit(**size) for size in sizes]
        for job, size in zip(jobs, sizes):
            assert torch.equal(job.result(60).images, pipe(**size).images)


def test_schedulers_of_diffusers_and_other_models_are_served_too(pipe: Pipeline, tmp_path: Path) -> None:
    """A scheduler object; LoRAs; a model that sees the mask; one that enlarges, through windows."""
    save_lora(lora_of(pipe.components), tmp_path / "a.safetensors", pipe.components)
    styled = pipe.with_loras({tmp_path / "a.safetensors": 0.1})
    inpainting, upscaling = (
        UNet2DConditionModel(replace(pipe.unet.config, **changes)).requires_grad_(False)
        for changes in ({"in_channels": 9}, {"in_channels": 7, "num_class_embeds": 1000})
    )
    for unet in (inpainting, upscaling):
        randomize(unet)
    low = NoiseSchedule(beta_schedule="linear", class_name="DDPMScheduler")
    models = [
        (pipe, {"sampler": DDIMScheduler.from_config(pipe.components.schedule.to_dict())}),
        (styled, {}),
        (Pipeline(replace(pipe.components, unet=inpainting)), {"image": noise_picture(32, 32), "mask": HALF}),
        (
            Pipeline(replace(pipe.components, unet=upscaling, low_res_schedule=low)),
            {"image": noise_picture(24, 20), "correction": "colour"},
        ),
    ]
    with Scheduler(pipe) as scheduler:
        jobs = [
            scheduler.submit("cat", pipe=model, seed=seed, num_inference_steps=3, **options)
            for model, options in models
            for seed in range(2)
        ]
        pictures = [job.result(60).images[0] for job in jobs]
        assert jobs[-1].given_pixels == 24 * 20
    for number, (model, options) in enumerate(models):
        for seed in range(2):
            expected = model("cat", seed=seed, num_inference_steps=3, **options).images[0]
            assert difference(pictures[2 * number + seed], expected) <= 1, number


def test_a_served_picture_can_be_replayed(pipe: Pipeline, built_model: Path, tmp_path: Path, capsys: Any) -> None:
    noise_picture(32, 32).save(tmp_path / "photo.png")
    from_file = {"image": tmp_path / "photo.png", "mask": HALF}
    several = [request for request in many(64) if "image" not in request and "latents" not in request][:14]
    several += [{"prompt": "cat", "seed": seed, "num_inference_steps": 5, **from_file} for seed in (6, 7)]
    with Scheduler(pipe, batch=4) as scheduler:
        results = [scheduler.submit(**request) for request in several]
        paths = [path for n, job in enumerate(results) for path in job.result(60).save(tmp_path / f"{n}.png")]
    assert len(paths) == 21
    for path in paths:
        assert read_record(path)["model_hash"] == pipe.components.model_hash
        again = tmp_path / "again" / path.name
        again.parent.mkdir(exist_ok=True)
        assert main(["replay", str(path), "--model", str(built_model), "--device", "cpu", "-o", str(again)]) == 0
        assert difference(open_image(path), open_image(again)) <= 1
    capsys.readouterr()


@pytest.mark.parametrize("name", ["sd1", "xl", "x4-upscaler", "lcm", "no-middle"])
def test_joined_calls_give_each_network_its_own_output(name: str) -> None:
    """Text, timesteps, and what else a U-Net is told, are those of each image, however many timesteps it has."""
    unet = UNet2DConditionModel(UNetConfig.from_dict(UNETS[name])).requires_grad_(False)
    randomize(unet)
    generator, config = torch.Generator().manual_seed(0), unet.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    networks, inputs, steps = [], [], []
    for images, count in ((2, 5), (1, 3), (2, 4)):
        added = {}
        if config.expects_sizes:
            added = {"text_embeds": draw(images, 16), "time_ids": draw(images, 6).abs()}
        if config.time_cond_proj_dim is not None:
            added = {"timestep_cond": draw(images, config.time_cond_proj_dim)}
        labels = None if config.num_class_embeds is None else torch.arange(images)
        timesteps = torch.linspace(900, 10, count)
        networks.append(unet.prepare(timesteps, draw(images, 7, 24), added=added, class_labels=labels))
        inputs.append(draw(images, config.in_channels, 8, 8))
        steps.append(torch.arange(images) + count - 2)
    networks[1] = networks[1].rows(slice(0, 1))
    assert len({text_shape(network) for network in networks}) == 1
    for network, sample, rows, output in zip(networks, inputs, steps, JoinedUNet(networks)(inputs, steps), strict=True):
        torch.testing.assert_close(output, network(sample, rows), rtol=1e-4, atol=1e-5)
