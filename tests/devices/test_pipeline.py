"""Everything a pipeline draws, on a pretended GPU: to the bit what it draws on the CPU, and without waits at each step.

The pretended device computes on the CPU, so what differs is the fault of code that asks where a tensor is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import latentdiff.generation.upscale
from latentdiff import Pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.cli import main
from latentdiff.diffusion import SAMPLERS, NoiseSchedule
from latentdiff.evaluate import negative_log_likelihood
from latentdiff.models.unet import UNet2DConditionModel
from tests.checkpoints.test_lora import lora_of
from tests.checkpoints.test_single_file import FAMILIES, components_of, tiny
from tests.fake_device import FakeDevice
from tests.models.tiny import noise_picture, randomize

STEPS: dict[str, Any] = {"num_inference_steps": 2}
PICTURE, MASK = noise_picture(32, 32), [0, 0, 16, 32]


@pytest.fixture(params=["cuda", pytest.param("mps", marks=pytest.mark.long)])
def device(request: pytest.FixtureRequest) -> Iterator[FakeDevice]:
    with FakeDevice(request.param) as device:
        yield device


@pytest.fixture(scope="module")
def models(pipe: Pipeline) -> dict[str, Pipeline]:
    """Models by what they do, on the CPU."""
    config, models = pipe.unet.config, {"text": pipe}
    changes: dict[str, dict[str, Any]] = {
        "inpaint": {"in_channels": 9},
        "upscale": {"in_channels": 7, "num_class_embeds": 1000},
        "lcm": {"time_cond_proj_dim": 32},
        "self-conditioned": {"in_channels": 8, "self_conditioning": True},
        "learned variance": {"out_channels": 8},
    }
    for name, change in changes.items():
        unet = UNet2DConditionModel(replace(config, **change)).requires_grad_(False)
        randomize(unet)
        components = replace(pipe.components, unet=unet)
        if name == "upscale":
            components = replace(components, low_res_schedule=NoiseSchedule(class_name="DDPMScheduler"))
        if name == "learned variance":
            components = replace(components, schedule=replace(components.schedule, variance_type="learned_range"))
        models[name] = Pipeline(components)
    return models


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, np.ndarray]:
    """What was drawn on the CPU already, by the name of the task."""
    return {}


Task = tuple[str, Callable[[Pipeline], Any]]
TASKS: dict[str, Task] = {
    "text": ("text", lambda pipe: pipe("the red fox", num_images=3, batch_size=2, **STEPS)),
    "long and short texts": ("text", lambda pipe: pipe(["the fox " * 9, "cat"], negative_prompt="un", **STEPS)),
    "weighted text": ("text", lambda pipe: pipe("a (fox:1.3)", **STEPS)),
    "blended texts": ("text", lambda pipe: pipe("a fox", blend_prompt="cat", blend=0.5, **STEPS)),
    "image": ("text", lambda pipe: pipe("a fox", image=PICTURE, strength=0.6, num_inference_steps=4)),
    "known image": ("text", lambda pipe: pipe("a fox", image=PICTURE, mask=MASK, feather=2, **STEPS)),
    "resampling": ("text", lambda pipe: pipe("a fox", image=PICTURE, mask=MASK, resampling=2, **STEPS)),
    "known image in part": ("text", lambda pipe: pipe("a fox", image=PICTURE, mask=MASK, strength=0.5, **STEPS)),
    "inpaint": ("inpaint", lambda pipe: pipe("a fox", image=PICTURE, mask=MASK, **STEPS)),
    "inpaint in part": ("inpaint", lambda pipe: pipe("a fox", image=PICTURE, mask=MASK, strength=0.5, **STEPS)),
    "inpaint without image": ("inpaint", lambda pipe: pipe("a fox", **STEPS)),
    "outpaint": ("text", lambda pipe: pipe("a fox", image=PICTURE, outpaint={"left": 8}, feather=2, **STEPS)),
    "outpaint by inpaint": ("inpaint", lambda pipe: pipe("a fox", image=PICTURE, outpaint={"left": 8}, **STEPS)),
    "hires": ("text", lambda pipe: pipe("a fox", hires=2, **STEPS)),
    "variation": ("text", lambda pipe: pipe("a fox", variation_strength=0.3, num_images=2, **STEPS)),
    "inversion": ("text", lambda pipe: pipe.invert(PICTURE, "a fox", num_inference_steps=3)),
    "inverted": ("text", lambda pipe: _inverted(pipe, sampler="ddim", guidance_scale=1.0)),
    "variation of inverted": ("text", lambda pipe: _inverted(pipe, variation_strength=0.3)),
    "rescaled guidance": ("text", lambda pipe: pipe("a fox", guidance_rescale=0.7, **STEPS)),
    "projected guidance": ("text", lambda pipe: pipe("a fox", guidance_parallel=0.0, **STEPS)),
    "limited guidance": ("text", lambda pipe: pipe("a fox", guidance_limit=1.0, **STEPS)),
    "guidance in between": ("text", lambda pipe: pipe("a fox", guidance_interval=(0.3, 5.0), **STEPS)),
    "guidance by time": ("text", lambda pipe: pipe("a fox", guidance_schedule="cosine", **STEPS)),
    "ddim with noise": ("text", lambda pipe: pipe("a fox", sampler="ddim", eta=1.0, **STEPS)),
    "tiles": ("text", lambda pipe: Pipeline(pipe.components, tile_size=8)("a fox", height=64, width=64, **STEPS)),
    "tensors": ("text", lambda pipe: pipe("a fox", output_type="pt", **STEPS)),
    "arrays": ("text", lambda pipe: pipe("a fox", output_type="np", **STEPS)),
    "latents": ("text", lambda pipe: pipe("a fox", output_type="latent", **STEPS)),
    "consistency": ("lcm", lambda pipe: pipe("a fox", sampler="lcm", **STEPS)),
    "self-conditioning": ("self-conditioned", lambda pipe: pipe("a fox", **STEPS)),
    "learned variance": ("learned variance", lambda pipe: pipe("a fox", sampler="ddpm", **STEPS)),
    "upscale": ("upscale", lambda pipe: pipe("a fox", image=PICTURE.resize((9, 7)), **STEPS)),
    "upscale in colour": (
        "upscale",
        lambda pipe: pipe(image=PICTURE.resize((9, 7)), scale=2, correction="colour", **STEPS),
    ),
    "upscale in windows": ("upscale", lambda pipe: _in_windows(pipe, correction="full")),
    **{
        f"sampler {name}": ("text", lambda pipe, name=name: pipe("a fox", sampler=name, num_inference_steps=3))  # type: ignore[misc]
        for name in (*SAMPLERS, "dpmpp_2m_karras")
    },
    **{
        f"diffusers' {name}": ("text", lambda pipe, name=name: _foreign(pipe, name))  # type: ignore[misc]
        for name in ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler")
    },
}


# On MPS too samplers differ in nothing but whether they draw noise.
ALIKE = {f"sampler {name}" for name in SAMPLERS} - {"sampler euler_a", "sampler lcm"}
FLOAT64 = ("projected guidance", "limited guidance")  # in which they compute, and in float32 on MPS


def _inverted(pipe: Pipeline, **options: Any) -> Any:
    noise = pipe.invert(PICTURE, "a fox", num_inference_steps=2)
    return pipe("a fox", latents=noise, num_inference_steps=3, **options)


def _in_windows(pipe: Pipeline, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latentdiff.generation.upscale, "AT_ONCE", 1)
        return pipe(image=PICTURE.resize((13, 8)), **options, **STEPS)


def _foreign(pipe: Pipeline, name: str) -> Any:
    scheduler = getattr(diffusers, name).from_config(pipe.components.schedule.to_dict())
    return pipe("a fox", sampler=scheduler, image=PICTURE, strength=0.7, num_inference_steps=4)


def numbers(drawn: Any) -> np.ndarray:
    """Return what was drawn as one array."""
    images = drawn if isinstance(drawn, Tensor) else drawn.images
    if isinstance(images, Tensor):
        return images.cpu().numpy()
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize(
    ("device", "name"),
    [*(("cuda", name) for name in TASKS), *(("mps", name) for name in TASKS if name not in ALIKE)],
    indirect=["device"],
)
def test_pictures_are_those_of_the_cpu(
    device: FakeDevice, models: dict[str, Pipeline], on_cpu: dict[str, np.ndarray], name: str
) -> None:
    model, draw = TASKS[name]
    drawn = draw(models[model].to(device.kind))
    if name not in on_cpu:
        on_cpu[name] = numbers(draw(models[model]))
    ours, theirs = numbers(drawn), on_cpu[name]
    if device.kind == "cuda" or name not in FLOAT64:
        assert np.array_equal(ours, theirs)
    else:
        assert np.abs(ours.astype(float) - theirs).max() <= 1  # of 255
    if not isinstance(drawn, Tensor):
        assert drawn.settings["device"] == device.kind


def test_the_fastest_device_is_found(device: FakeDevice, built_model: Path) -> None:
    pipe = Pipeline.from_pretrained(built_model)
    assert pipe.device == device.device
    assert all(device.holds(weight) for weight in pipe.text_encoder.parameters())


def test_what_stays_on_the_device(device: FakeDevice, models: dict[str, Pipeline]) -> None:
    pipe = models["text"].to(device.kind)
    assert device.holds(pipe("a fox", output_type="latent", **STEPS).images)
    seen = []
    pipe("a fox", callback=lambda done, total, denoised: seen.append(device.holds(denoised)), **STEPS)
    assert seen == [True, True]


@pytest.mark.parametrize("family", [*FAMILIES, "inpainting"])
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_every_family_in_half_precision(device: FakeDevice, family: str) -> None:
    _draw_in_half(device, family, "float16")


@pytest.mark.parametrize("family", ["Stable Diffusion 2.x", "Stable Diffusion XL"])
@pytest.mark.parametrize("device", ["mps"], indirect=True)
def test_families_in_bfloat16(device: FakeDevice, family: str) -> None:
    _draw_in_half(device, family, "bfloat16")


def _draw_in_half(device: FakeDevice, family: str, dtype: str) -> None:
    kind, channels = ("Stable Diffusion 1.x", 9) if family == "inpainting" else (family, 4)
    components = components_of(tiny(kind), channels)
    options: dict[str, Any] = {**STEPS, "sampler": "dpmpp_2m", "output_type": "pt"}
    if components.upscales:
        options["image"] = PICTURE.resize((8, 8))
    elif components.inpaints:
        options |= {"image": PICTURE, "mask": MASK}
    else:
        options |= {"height": 32, "width": 32}
    half = Pipeline(components).to(dtype=dtype)
    drawn, expected = (pipe("a (red fox:1.2)" * 20, **options) for pipe in (half.to(device.kind), half))
    assert np.array_equal(numbers(drawn), numbers(expected))


def test_tiles_in_half_precision(device: FakeDevice, models: dict[str, Pipeline]) -> None:
    half = models["text"].to(device.kind, "float16")
    drawn = Pipeline(half.components, tile_size=8)("a fox", height=64, width=64, output_type="pt", **STEPS).images
    whole = half("a fox", height=64, width=64, output_type="pt", **STEPS).images
    assert (drawn - whole).abs().max() < 0.1


def test_offloaded_networks(device: FakeDevice, models: dict[str, Pipeline], built_model: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(built_model, offload=True)
    save_lora(lora_of(pipe.components), tmp_path / "a.safetensors", pipe.components)
    for drawing, plain in (
        (pipe, models["text"]),
        *((one.with_loras({tmp_path / "a.safetensors": 0.1}) for one in (pipe, models["text"])),),
    ):
        for name in ("hires", "known image") if drawing is pipe else ("text",):
            assert np.array_equal(numbers(TASKS[name][1](drawing)), numbers(TASKS[name][1](plain)))
        assert not any(device.holds(weight) for weight in drawing.unet.parameters())


def test_loras_and_words(device: FakeDevice, models: dict[str, Pipeline], tmp_path: Path) -> None:
    pipe = models["text"]
    save_lora(lora_of(pipe.components), tmp_path / "a.safetensors", pipe.components)
    save_file({"foxtoy": torch.ones(2, 16)}, tmp_path / "word.safetensors")

    def draw(pipe: Pipeline) -> Any:
        known = pipe.with_embedding(tmp_path / "word.safetensors").with_loras({tmp_path / "a.safetensors": 0.1})
        return known("a foxtoy", **STEPS), known.with_loras({})("a foxtoy", **STEPS)

    for ours, theirs in zip(draw(pipe.to(device.kind)), draw(pipe)):
        assert np.array_equal(numbers(ours), numbers(theirs))


def test_saved_and_brought_back(device: FakeDevice, models: dict[str, Pipeline], tmp_path: Path) -> None:
    pipe = models["text"].to(device.kind)
    pipe.save_pretrained(tmp_path / "saved")
    expected = numbers(models["text"]("a fox", **STEPS))
    for other in (pipe.to("cpu"), Pipeline.from_pretrained(tmp_path / "saved")):
        assert np.array_equal(numbers(other("a fox", **STEPS)), expected)


def test_replayed_where_it_was_drawn_and_elsewhere(
    device: FakeDevice, built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a fox", "--model", str(built_model), "--steps", "2", "-o", "a.png"]) == 0
    with Image.open("a.png") as picture:
        record = json.loads(picture.info["latentdiff"])
    assert record["device"] == device.kind
    for place in ([], ["--device", "cpu"]):
        assert main(["replay", "a.png", "-o", "b.png", "--model", str(built_model), *place]) == 0
        assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))


def test_likelihoods(device: FakeDevice, models: dict[str, Pipeline]) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    schedule = NoiseSchedule(num_train_timesteps=6, beta_end=0.8)
    components = replace(models["text"].components, schedule=schedule)
    texts = ["a fox", "a cat", "the fox " * 9]
    expected = negative_log_likelihood(components, images, texts, ode_steps=2)
    moved = Pipeline(components).to(device.kind).components
    found = negative_log_likelihood(moved, images.to(device.device), texts, ode_steps=2)
    for name in ("bound", "ode", "autoencoder"):
        for key, figures in expected[name].items():
            assert found[name][key] == pytest.approx(figures, rel=1e-4)


WAITS = {"text": 4, "image": 5, "known image": 5, "inpaint": 5}  # for each picture, whatever the number of steps


@pytest.mark.parametrize("name", list(WAITS))
def test_nothing_waits_at_each_step(device: FakeDevice, models: dict[str, Pipeline], name: str) -> None:
    model, _ = TASKS[name]
    pipe = models[model].to(device.kind)
    options: dict[str, Any] = {} if name == "text" else {"image": PICTURE, "strength": 1.0}
    options |= {"mask": MASK} if "known" in name or "inpaint" in name else {}
    for sampler in ("dpmpp_2m", "euler_a"):
        counts = []
        for steps in (4, 8):
            device.forget()
            pipe("a fox", num_inference_steps=steps, sampler=sampler, **options)
            counts.append((sum(device.syncs.values()), dict(device.syncs), sum(device.copies.values())))
        assert counts[0][:2] == counts[1][:2]
        assert counts[0][0] == WAITS[name]
        noise = 4 if sampler == "euler_a" else 0  # which each step draws on the CPU
        assert counts[1][2] - counts[0][2] == noise
