"""The pipeline: what a seed means, what each argument changes, and what is refused."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
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
from latentdiff.diffusion import NoiseSchedule, draw_noise, image_generator
from latentdiff.errors import InputError, StorageError
from latentdiff.generation.result import Result, read_record
from latentdiff.images import from_tensor, open_image, to_tensor
from tests.checkpoints.test_lora import lora_of
from tests.models.tiny import noise_picture

STEPS = {"num_inference_steps": 3}


def latents(pipe: Pipeline, prompt: Any = "the red fox", **settings: Any) -> Tensor:
    return pipe(prompt, output_type="latent", **{**STEPS, **settings}).images


def test_same_seed_same_bytes(pipe: Pipeline, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        pipe("the red fox", seed=7, **STEPS).save(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not torch.equal(latents(pipe, seed=7), latents(pipe, seed=8))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "ddpm"])
def test_image_i_is_the_first_image_of_seed_plus_i(pipe: Pipeline, sampler: str) -> None:
    several = latents(pipe, seed=5, num_images=3, sampler=sampler)
    for index in range(3):
        alone = latents(pipe, seed=5 + index, sampler=sampler)
        assert torch.allclose(several[index], alone[0], atol=1e-4)


def test_initial_noise_of_an_image_is_bitwise_its_own(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    import latentdiff.generation.run as module

    drawn: list[Tensor] = []

    def record(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
        drawn.append(draw_noise(generators, shape))
        return drawn[-1]

    monkeypatch.setattr(module, "draw_noise", record)
    latents(pipe, seed=5, num_images=4)
    latents(pipe, seed=5)
    latents(pipe, seed=6, num_images=3, batch_size=2)
    four, one, two, last = drawn
    assert torch.equal(four[:1], one)
    assert torch.equal(four[1:], torch.cat([two, last]))
    assert torch.equal(one[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)))


def test_batch_size_changes_no_more_than_rounding(pipe: Pipeline) -> None:
    whole = latents(pipe, num_images=5, batch_size=5)
    split = latents(pipe, num_images=5, batch_size=2)
    assert torch.allclose(whole, split, atol=1e-4)


def test_prompts_times_images(pipe: Pipeline) -> None:
    result = pipe(["the red fox", "cat"], num_images=2, seed=3, **STEPS)
    assert len(result.images) == 4
    assert result.seeds == [3, 4, 5, 6]
    assert [result.record(index)["prompt"] for index in range(4)] == ["the red fox"] * 2 + ["cat"] * 2
    assert result.token_counts == [5, 5, 3, 3]
    assert result.notes == []
    assert torch.allclose(latents(pipe, "cat", seed=6), latents(pipe, ["the red fox", "cat"], num_images=2, seed=3)[3:])


def test_other_prompts_do_not_change_a_picture(pipe: Pipeline) -> None:
    """A prompt of several windows beside it would pad the shorter one's text, were they in one batch."""
    long = "red fox " * 9
    mixed = latents(pipe, ["cat", long, "cat"], seed=1)
    assert torch.allclose(mixed[:1], latents(pipe, "cat", seed=1), atol=1e-4)
    assert torch.allclose(mixed[1:2], latents(pipe, long, seed=2), atol=1e-4)
    assert torch.allclose(mixed[2:], latents(pipe, "cat", seed=3), atol=1e-4)


def test_no_word_of_a_long_prompt_is_lost(pipe: Pipeline) -> None:
    long = "red fox " * 9
    assert not torch.allclose(latents(pipe, long + "cat"), latents(pipe, long + "the"), atol=1e-3)
    assert pipe(long, **STEPS).token_counts == [20]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "cat"},
        {"negative_prompt": "cat"},
        {"guidance_scale": 3.0},
        {"guidance_rescale": 0.7},
        {"guidance_interval": (0.1, 2.0)},
        {"sampler": "euler"},
        {"sampler": "dpmpp_2m_karras"},
        {"num_inference_steps": 4},
        {"seed": 1},
    ],
)
def test_every_setting_has_an_effect(pipe: Pipeline, change: dict[str, Any]) -> None:
    assert not torch.allclose(latents(pipe, **change), latents(pipe), atol=1e-4)


def test_without_guidance_the_negative_prompt_has_no_say(pipe: Pipeline) -> None:
    plain = latents(pipe, guidance_scale=1.0)
    assert torch.equal(plain, latents(pipe, guidance_scale=1.0, negative_prompt="cat"))
    assert torch.equal(plain, latents(pipe, guidance_scale=0.5))


def test_sizes(pipe: Pipeline) -> None:
    assert pipe.native_size == (32, 32)
    assert pipe("cat", width=48, height=16, **STEPS).images[0].size == (48, 16)
    assert pipe("cat", width=40, **STEPS).images[0].size == (40, 32)
    with pytest.raises(InputError, match="width must be a multiple of 8, got 42; try 40 or 48"):
        pipe("cat", width=42)
    with pytest.raises(InputError, match="height must be a whole number from 8 to 128, got 1024"):
        pipe("cat", height=1024)


def test_output_types(pipe: Pipeline) -> None:
    picture = np.asarray(pipe("cat", **STEPS).images[0], dtype=float)
    tensor = pipe("cat", output_type="pt", **STEPS).images
    array = pipe("cat", output_type="np", **STEPS).images
    assert tensor.shape == (1, 3, 32, 32)
    assert array.shape == (1, 32, 32, 3)
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert np.array_equal((array[0] * 255).round(), picture)
    assert torch.equal(tensor[0].permute(1, 2, 0), torch.from_numpy(array[0]))
    with pytest.raises(InputError, match="output_type 'pill' is unknown; did you mean 'pil'"):
        pipe("cat", output_type="pill")


def test_given_latents_replace_the_noise(pipe: Pipeline) -> None:
    noise = draw_noise([image_generator(9), image_generator(10)], (4, 8, 8))
    plain = {"sampler": "dpmpp_2m", "num_images": 2}  # a sampler that draws noise takes it from the seeds
    assert torch.equal(latents(pipe, seed=0, latents=noise, **plain), latents(pipe, seed=9, **plain))
    with pytest.raises(InputError, match=r"latents must have shape \(1, 4, 8, 8\), got \(2, 4, 8, 8\)"):
        pipe("cat", latents=noise)
    with pytest.raises(InputError, match="latents must be finite"):
        pipe("cat", latents=torch.full((1, 4, 8, 8), torch.nan))


def test_callback_counts_every_step_and_may_end_the_call(pipe: Pipeline) -> None:
    calls: list[tuple[int, int, tuple[int, ...]]] = []
    pipe("cat", num_images=3, batch_size=2, callback=lambda *c: calls.append((c[0], c[1], tuple(c[2].shape))), **STEPS)
    assert [call[:2] for call in calls] == [(step, 6) for step in range(1, 7)]
    assert calls[0][2] == (2, 4, 8, 8)
    assert calls[-1][2] == (1, 4, 8, 8)

    def stop(step: int, total: int, estimate: Tensor) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pipe("cat", callback=stop, **STEPS)


def test_progress_goes_to_stderr_only_when_asked(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe("cat", **STEPS)
    assert capsys.readouterr() == ("", "")
    pipe("cat", progress=True, **STEPS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step" in captured.err


def photo(width: int = 40, height: int = 20) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, across], axis=-1).astype(np.uint8))


def test_image_to_image_starts_from_the_image(pipe: Pipeline) -> None:
    """With little strength the latents stay near those of the image, with all of it they do not."""
    source = photo(32, 32)
    encoded = pipe.autoencoder.encode(to_tensor([source])).mode() * pipe.autoencoder.config.scaling_factor
    near, far = (
        latents(pipe, image=source, strength=strength, num_inference_steps=20, guidance_scale=1.0)
        for strength in (0.05, 1.0)
    )
    assert (near - encoded).abs().mean() < 0.5 * (far - encoded).abs().mean()


def test_image_to_image_of_two_prompts_and_any_shape(pipe: Pipeline, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.jpg")
    result = pipe(["cat", "the red fox"], image=tmp_path / "photo.jpg", num_images=2, num_inference_steps=5)
    assert [image.size for image in result.images] == [(48, 24)] * 4
    assert result.settings["strength"] == 0.8
    assert pipe("cat", image=photo(), width=32, height=16, **STEPS).images[0].size == (32, 16)


def test_image_to_image_skips_as_many_steps_as_diffusers(pipe: Pipeline) -> None:
    seen: list[int] = []
    pipe("cat", image=photo(), strength=0.6, num_inference_steps=10, callback=lambda i, n, x: seen.append(n))
    assert seen == [6] * 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.5}, "got no image"),
        ({"image": 3}, "image must be a picture, an array or a path, got int"),
        ({"image": "none.png"}, "cannot read image"),
        ({"image": photo(), "strength": 0.0}, "strength must be"),
        ({"image": photo(), "strength": 0.01, "num_inference_steps": 10}, "try strength 0.1"),
        ({"image": photo(), "strength": 1.2}, "strength must be"),
        ({"sampler": "dimm"}, "did you mean 'ddim'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"guidance_interval": (5.0, 1.0)}, "guidance_interval must rise"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"prompt": []}, "prompt must not be empty"),
        ({"prompt": "x" * 10**6}, "at most 4000 characters"),
        ({"prompt": "a\0b"}, "NUL"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "cat", **settings})


def test_saved_pictures_say_how_to_make_them_again(pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe(["cat", "the red fox"], num_images=3, seed=2, batch_size=4, **STEPS)
    paths = result.save(tmp_path / "a.png")
    assert [path.name for path in paths] == ["a.png", *(f"a-{i}.png" for i in range(2, 7))]
    record = read_record(paths[5])
    assert record["prompt"] == "the red fox"
    assert record["seed"] == 7
    assert (record["batch_size"], record["batch_index"]) == (2, 1)
    assert record["model_hash"] == pipe.components.model_hash
    assert record["dtype"] == "float32"
    assert record == json.loads(json.dumps(result.record(5)))
    again = pipe("the red fox", seed=6, num_images=2, **STEPS)  # image 1 of a batch of 2 that starts at seed 7 - 1
    assert np.array_equal(np.asarray(again.images[1]), np.asarray(open_image(paths[5])))


def test_saved_pictures_replace_the_file_that_was_named_alone(pipe: Pipeline, tmp_path: Path) -> None:
    for name in ("a.png", "a-2.png"):
        (tmp_path / name).write_bytes(b"mine")
    result = pipe("cat", num_images=2, **STEPS)
    assert result.save(tmp_path / "a.png") == [tmp_path / "a.png", tmp_path / "a-3.png"]
    assert (tmp_path / "a-2.png").read_bytes() == b"mine" and read_record(tmp_path / "a.png")["seed"] == 0
    result.write(1, tmp_path / "a-2.png")
    assert read_record(tmp_path / "a-2.png")["seed"] == 1


@pytest.mark.parametrize("index", ["x", None, 1.0, -1, 2, True])
def test_an_image_that_is_none_cannot_be_written(pipe: Pipeline, tmp_path: Path, index: Any) -> None:
    result = pipe("cat", num_images=2, **STEPS)
    with pytest.raises(InputError, match="an image must be one of 0 to 1, got "):
        result.write(index, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_cannot_be_saved_where_there_is_no_folder(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no folder '.*foxes'; create it first"):
        pipe("cat", **STEPS).save(tmp_path / "foxes/1.png")


def test_tensors_cannot_be_saved(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only pictures can be saved"):
        pipe("cat", output_type="pt", **STEPS).save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_pictures_without_settings_are_refused(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    with pytest.raises(InputError, match="must hold latentdiff's settings"):
        read_record(tmp_path / "a.png")


def test_threads_share_a_pipeline(pipe: Pipeline) -> None:
    expected = [latents(pipe, seed=seed, num_inference_steps=2 + seed) for seed in range(4)]
    barrier = threading.Barrier(4)

    def draw(seed: int) -> Tensor:
        barrier.wait()
        return latents(pipe, seed=seed, num_inference_steps=2 + seed)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(expected, pool.map(draw, range(4))))


def test_a_decode_that_overflows_is_redone_in_float32_and_said(built_model: Path) -> None:
    half = Pipeline.from_pretrained(built_model, device="cpu", dtype="float16")
    with torch.no_grad():  # too much for float16, but taken out again by the group norm that follows
        half.autoencoder.decoder.conv_in.weight *= 60_000
    with pytest.warns(RuntimeWarning, match="overflowed in torch.float16 and was run again in float32") as warned:
        result = half("cat", **STEPS)
    assert warned[0].filename == __file__
    assert len(result.notes) == 1
    with torch.no_grad():
        expected = copy.deepcopy(half.autoencoder).float()
        drawn = expected.decode(latents(half, "cat") / expected.config.scaling_factor)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(from_tensor(drawn)[0]))


def test_numbers_that_overflow_even_in_float32_are_an_error(built_model: Path) -> None:
    pipe = Pipeline.from_pretrained(built_model, device="cpu")
    with torch.no_grad():
        pipe.autoencoder.decoder.conv_out.weight.fill_(torch.inf)
    with pytest.raises(InputError, match="overflowed even in float32"):
        pipe("cat", **STEPS)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="network's output became NaN or infinite"):
        pipe("cat", output_type="latent", **STEPS)


def test_a_scheduler_object_that_fails_is_told_from_a_network_that_overflows(built_model: Path) -> None:
    pipe = Pipeline.from_pretrained(built_model, device="cpu")
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    scheduler = DDIMScheduler.from_config(pipe.components.schedule.to_dict())
    with pytest.raises(InputError, match="became NaN or infinite; pass the name of one of our samplers, or use"):
        pipe("cat", sampler=scheduler, output_type="latent", **STEPS)


def test_what_is_moved_leaves_those_it_shares_weights_with_usable(pipe: Pipeline, tmp_path: Path) -> None:
    save_lora(lora_of(pipe.components), tmp_path / "a.safetensors", pipe.components)
    styled, plain = pipe.with_loras({tmp_path / "a.safetensors": 0.1}), latents(pipe)
    half = styled.to(dtype="bfloat16")
    assert (half.dtype, styled.dtype, pipe.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert pipe("fox", num_inference_steps=1).images and half("fox", num_inference_steps=1).images
    assert torch.equal(latents(pipe), plain) and torch.equal(
        latents(half.with_loras({}).to(dtype="float32")), latents(pipe.to(dtype="bfloat16").to(dtype="float32"))
    )
    same = pipe.to("cpu")
    assert same.unet is not pipe.unet
    assert same.unet.conv_in.weight.data_ptr() == pipe.unet.conv_in.weight.data_ptr()  # shared, not copied
    assert same.components.model_hash == pipe.components.model_hash


def test_dtypes_and_devices(built_model: Path, pipe: Pipeline) -> None:
    half = Pipeline.from_pretrained(built_model, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    drawn = latents(half)
    assert drawn.dtype == torch.float32
    assert (drawn - latents(pipe)).abs().max() < 0.5
    whole = half.to(dtype=torch.float32)
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert half.device == torch.device("cpu")
    with pytest.raises(InputError, match="did you mean 'float16'"):
        Pipeline.from_pretrained(built_model, dtype="floar16")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(InputError, match=f"got '{device}'"):
            Pipeline.from_pretrained(built_model, device=device)


def test_zero_terminal_snr(pipe: Pipeline) -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    drawn = latents(Pipeline(replace(pipe.components, schedule=schedule)), num_inference_steps=5)
    assert torch.isfinite(drawn).all()


def test_the_old_name_of_components_is_told_of(pipe: Pipeline) -> None:
    with pytest.warns(DeprecationWarning, match="called components now"):
        assert pipe.parts is pipe.components
    assert isinstance(pipe("cat", **STEPS), Result)


@pytest.fixture
def half_mask() -> Image.Image:
    """White on the right half of a 32 x 32 picture."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    return mask


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_a", "unipc"])
def test_inpainting_keeps_the_pixels_that_are_not_masked(pipe: Pipeline, half_mask: Image.Image, sampler: str) -> None:
    photo = noise_picture(32, 32)
    drawn = pipe("the red fox", image=photo, mask=half_mask, sampler=sampler, **STEPS)
    before, after = np.asarray(photo, dtype=int), np.asarray(drawn.images[0], dtype=int)
    assert after.shape == before.shape
    assert np.abs(after[:, :16] - before[:, :16]).max() <= 1
    assert np.abs(after[:, 16:] - before[:, 16:]).mean() > 5
    assert drawn.settings["strength"] == 1.0 and drawn.settings["mask"]["hash"]


def test_inpainting_at_full_strength_forgets_what_was_there(pipe: Pipeline, half_mask: Image.Image) -> None:
    left = noise_picture(32, 32)
    other = left.copy()
    other.paste((255, 0, 0), (24, 0, 32, 32))  # apart from the border, which the encoder sees from the left half too
    first, second = (
        pipe("fox", image=one, mask=half_mask, output_type="latent", **STEPS).images for one in (left, other)
    )
    assert (first - second)[..., -1].abs().max() < 0.2 * first.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": Image.new("L", (32, 32))}, "a mask says which part of an image is drawn anew, got no image"),
        (
            {"image": "photo", "mask": Image.new("L", (16, 32))},
            "the mask must have the size of the image, 32x32",
        ),
        ({"image": "photo", "mask": 3}, "mask must be a picture, an array or a path, got int"),
    ],
)
def test_bad_masks(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    if "image" in options:
        options = {**options, "image": Image.new("RGB", (32, 32), "green")}
    with pytest.raises(InputError, match=message):
        pipe("the red fox", **options, **STEPS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: Pipeline.from_pretrained(device="hpu"), "device must be one that is here, got 'hpu'"),
        (lambda pipe: Pipeline.from_pretrained(device="meta"), "device must be one that computes, got 'meta'"),
        (lambda pipe: pipe("x", seed=torch.tensor([1, 2])), "seed must be a whole number"),
        (lambda pipe: pipe("x", latents=[1], **STEPS), "latents must be a dense tensor of numbers"),
        (
            lambda pipe: pipe("x", latents=torch.zeros(1, 4, 8, 8).to_sparse(), **STEPS),
            "latents must be a dense tensor",
        ),
        (lambda pipe: pipe("x", latents=torch.zeros(1, 4, 8, 8, device="meta"), **STEPS), "latents must be a dense"),
        (lambda pipe: pipe("x", callback=3, **STEPS), "callback must be a function of three arguments, got 3"),
        (lambda pipe: pipe("x", **STEPS).write(5, "x.png"), "an image must be one of 0 to 0, got 5"),
        (
            lambda pipe: pipe("x", **STEPS).save("x.gif"),
            r"pictures are written as PNG, JPEG or WebP, got 'x.gif'; name it \.png",
        ),
        (lambda pipe: pipe.invert(photo(), "x", iterations=10**9), "iterations must be a whole number from 1 to 100"),
        (lambda pipe: pipe.to(dtype="x" * 10**5), "dtype 'x"),
    ],
)
def test_odd_arguments_are_one_line(pipe: Pipeline, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(pipe)
    assert len(str(caught.value)) <= 600 and "\n" not in str(caught.value)


def test_none_is_the_default_of_an_option(pipe: Pipeline) -> None:
    assert torch.equal(latents(pipe, negative_prompt=None, sampler=None, guidance_scale=None), latents(pipe))
