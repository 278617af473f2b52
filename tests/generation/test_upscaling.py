"""Pictures made larger by the pipeline and the command line: of any size, through windows, transparent, in bounds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import latentdiff.generation.upscale
from latentdiff import Pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.cli import main
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError, ModelConfigError
from latentdiff.generation.inputs import prepare_small_image
from latentdiff.generation.masks import with_filled_background
from latentdiff.generation.request import Settings
from latentdiff.generation.result import read_record
from latentdiff.generation.upscale import plan_upscale, reduced
from latentdiff.images import open_rgba, to_tensor
from latentdiff.models.unet import UNet2DConditionModel
from tests.checkpoints.test_lora import lora_of
from tests.models.tiny import randomize

STEPS: dict[str, Any] = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def upscaler(pipe: Pipeline) -> Pipeline:
    """A model that draws 4 times as large, trained at 8 x 8 small pixels, that is."""
    unet = UNet2DConditionModel(replace(pipe.unet.config, in_channels=7, num_class_embeds=1000)).requires_grad_(False)
    randomize(unet)
    low = NoiseSchedule(beta_schedule="linear", class_name="DDPMScheduler")
    return Pipeline(replace(pipe.components, unet=unet, low_res_schedule=low))


@pytest.fixture(scope="module")
def folder(upscaler: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder."""
    place = tmp_path_factory.mktemp("upscaler") / "model"
    upscaler.save_pretrained(place)
    (place / "generation_config.json").write_text('{"guidance_scale": 1, "correction": "colour"}')
    return place


def test_a_model_has_defaults_of_its_own(upscaler: Pipeline, folder: Path, tmp_path: Path) -> None:
    with_defaults = Pipeline.from_pretrained(folder, device="cpu")
    settings = with_defaults("a fox", image=smooth(8, 8), num_inference_steps=2).settings
    assert (settings["guidance_scale"], settings["correction"], settings["sampler"]) == (1.0, "colour", "euler_a")
    assert (
        with_defaults("a fox", image=smooth(8, 8), num_inference_steps=2, guidance_scale=3).settings["guidance_scale"]
        == 3
    )
    with_defaults.save_pretrained(tmp_path / "copy")
    assert Pipeline.from_pretrained(tmp_path / "copy").components.defaults == with_defaults.components.defaults
    upscaler.save_pretrained(tmp_path / "copy")
    assert Pipeline.from_pretrained(tmp_path / "copy").components.defaults == {}
    for text, message in (
        ('{"steps": 3}', "is no option of a model"),
        ('{"sampler": 3}', "sampler must be a name, got 3"),
    ):
        (tmp_path / "copy/generation_config.json").write_text(text)
        with pytest.raises(ModelConfigError, match=message):
            Pipeline.from_pretrained(tmp_path / "copy")


def smooth(width: int, height: int, channels: int = 3) -> Image.Image:
    """A picture of soft blobs."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (7, 9), (33, 5), (1, 400), (40, 24)])
def test_pictures_of_any_size_are_four_times_as_large(upscaler: Pipeline, size: tuple[int, int]) -> None:
    result = upscaler(image=smooth(*size), **STEPS)
    assert result.images[0].size == (4 * size[0], 4 * size[1])
    assert result.record(0)["size"] == [4 * size[0], 4 * size[1]] and result.record(0)["prompt"] == ""
    assert upscaler("a fox", image=smooth(*size), scale=2, **STEPS).images[0].size == (2 * size[0], 2 * size[1])


def test_scale_2_is_scale_4_made_smaller(upscaler: Pipeline) -> None:
    options: dict[str, Any] = {"image": smooth(9, 6), "output_type": "pt", **STEPS}
    full, half = (upscaler("a fox", scale=scale, **options).images for scale in (None, 2))
    assert torch.equal(full, upscaler("a fox", scale=4, **options).images) and reduced(full, 24, 36) is full
    for ours, theirs in zip(half[0], full[0]):
        plane = Image.fromarray(theirs.numpy()).resize((18, 12), Image.Resampling.LANCZOS)
        assert (ours - torch.from_numpy(np.array(plane)).clamp(0, 1)).abs().max() < 1e-5


def tiled(upscaler: Pipeline, monkeypatch: pytest.MonkeyPatch, at_once: int, **options: Any) -> torch.Tensor:
    """Return latents drawn at once, or in windows of what the model was trained at."""
    monkeypatch.setattr(latentdiff.generation.upscale, "AT_ONCE", at_once)
    return upscaler("the red fox", output_type="latent", num_inference_steps=5, **options).images


@pytest.mark.parametrize("size", [(80, 48), (75, 61)])
def test_windows_leave_no_seams(upscaler: Pipeline, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    """What windows change is no larger where they begin and end than inside, nor does it jump there."""
    unet = UNet2DConditionModel(replace(upscaler.unet.config, sample_size=32)).requires_grad_(False)
    randomize(unet, seed=1)
    upscaler = Pipeline(replace(upscaler.components, unet=unet))
    options: dict[str, Any] = {"image": smooth(*size), "sampler": "ddim", "guidance_scale": 1.0, "num_images": 2}
    whole = tiled(upscaler, monkeypatch, 10**9, **options)
    monkeypatch.setattr(latentdiff.generation.upscale, "AT_ONCE", 0)
    windows = plan_upscale(upscaler.components, size, torch.device("cpu")).windows
    assert len(windows) > 3
    change = tiled(upscaler, monkeypatch, 0, **options) - whole
    for axis, starts, side in ((3, windows.columns, windows.wide), (2, windows.rows, windows.tall)):
        length = change.shape[axis]
        borders = {place for start in starts for place in (start, start + side) if 0 < place < length}
        edges = sorted({place + shift for place in borders for shift in (-1, 0)})
        inside = [place for place in range(length) if place not in edges]
        assert edges and inside
        largest = change.abs().amax(dim=[d for d in range(4) if d != axis])
        assert largest[edges].max() <= largest[inside].max()
        jumps = change.diff(dim=axis).abs().amax(dim=[d for d in range(4) if d != axis])
        others = [place for place in range(length - 1) if place + 1 not in borders]
        assert jumps[[place - 1 for place in borders]].max() <= jumps[others].max()


def test_one_window_over_all_changes_no_bit(upscaler: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ((8, 8), (6, 4)):
        first, second = (tiled(upscaler, monkeypatch, times, image=smooth(*size)) for times in (10**9, 0))
        assert torch.equal(first, second)


def test_noise_belongs_to_the_image(upscaler: Pipeline) -> None:
    """Image i of seed s is image 0 of seed s + i, in windows too."""
    options: dict[str, Any] = {"image": smooth(20, 20), "output_type": "latent", **STEPS}
    several = upscaler("cat", num_images=3, seed=4, **options).images
    torch.testing.assert_close(several[2:], upscaler("cat", seed=6, **options).images)
    assert not torch.allclose(several[0], several[1], atol=1e-3)


def test_an_empty_prompt_is_not_guided(upscaler: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to steer away from, so it takes half of the time."""
    rows = list[int]()
    original = UNet2DConditionModel._predict

    def counted(self: Any, sample: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(sample))
        return original(self, sample, *rest)

    monkeypatch.setattr(UNet2DConditionModel, "_predict", counted)
    options: dict[str, Any] = {"image": smooth(8, 8), "output_type": "latent", "num_inference_steps": 1}
    empty = upscaler("", **options).images
    assert torch.equal(empty, upscaler("", guidance_scale=1.0, **options).images)
    upscaler("a fox", **options)
    upscaler("a fox", negative_prompt="a fox", **options)
    assert rows == [1, 1, 2, 1]


def test_transparent_pictures_stay_transparent(upscaler: Pipeline, tmp_path: Path) -> None:
    image = smooth(10, 8, channels=4)
    opaque = with_filled_background(image)
    result, plain = (upscaler("a fox", image=one, **STEPS) for one in (image, opaque))
    (path,) = result.save(tmp_path / "a.png")
    drawn = open_rgba(path)
    alpha = image.getchannel("A").resize((40, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(drawn.getchannel("A")), np.asarray(alpha))
    assert np.array_equal(np.asarray(drawn)[:, :, :3], np.asarray(plain.images[0]))
    assert plain.images[0].mode == "RGB"
    assert upscaler("a fox", image=image, scale=2, **STEPS).images[0].size == (20, 16)


def test_edges_of_a_transparent_picture_have_the_colours_of_the_picture() -> None:
    """A red disc with a soft edge: whatever is under its transparent parts, nothing of that is seen when enlarged."""
    y, x = np.mgrid[:32, :32] - 15.5
    opacity = np.clip(12 - np.hypot(x, y), 0, 1)
    for background in (0, 255):
        colours = np.full((32, 32, 3), background, np.uint8)
        colours[opacity > 0] = (200, 30, 40)
        disc = Image.fromarray(np.dstack([colours, (opacity * 255).astype(np.uint8)]))
        prepared = prepare_small_image(Settings(prompts=("",)), disc, None, 4)
        assert prepared.pixels is not None and prepared.opacity is not None
        assert prepared.pixels.unique(dim=2).flatten(2).unique(dim=2).shape[2] == 1  # all of it is that red
        assert prepared.opacity.size == (128, 128) and prepared.opacity.getextrema() == (0, 255)
    assert prepare_small_image(Settings(prompts=("",)), Image.new("RGBA", (8, 8)), None, 4).opacity is not None


def test_what_memory_cannot_hold_is_refused(upscaler: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth(40, 40)
    plan = upscaler.upscale_plan(image)
    assert len(plan.windows) > 1 and plan.size == (160, 160)
    assert upscaler.upscale_plan(smooth(400, 400)).need > plan.need
    monkeypatch.setattr(latentdiff.generation.upscale, "memory_of", lambda device: plan.need - 1)
    for call in (upscaler.upscale_plan, lambda image: upscaler("a fox", image=image)):
        with pytest.raises(InputError, match=r"would be 160x160 pixels in \d+ overlapping windows .* and there are"):
            call(image)
    upscaler("a fox", image=smooth(8, 8), **STEPS)


def test_what_is_enlarged_is_corrected_by_the_small_picture(upscaler: Pipeline) -> None:
    small = smooth(24, 20)
    options: dict[str, Any] = {"image": small, "output_type": "pt", **STEPS}
    none, colour, full = (
        upscaler("a", correction=name, **options).images * 2 - 1 for name in ("none", "colour", "full")
    )
    given = to_tensor([small])

    def apart(images: torch.Tensor, blur: float) -> float:
        change = (reduced(images, 20, 24) - given).numpy()
        return float(np.abs(gaussian_filter(change, blur, axes=(2, 3), mode="nearest")).mean())

    assert torch.equal(upscaler("a", **options).images * 2 - 1, none)
    assert apart(full, 0) < apart(colour, 0) / 3 < apart(none, 0)
    assert apart(colour, 4) < apart(none, 4) / 3
    with pytest.raises(InputError, match="correction 'color' is unknown; did you mean 'colour'"):
        upscaler("a", correction="color", **options)


def test_noise_is_limited_by_what_the_model_knows(upscaler: Pipeline) -> None:
    unet = UNet2DConditionModel(replace(upscaler.unet.config, num_class_embeds=11)).requires_grad_(False)
    few = Pipeline(replace(upscaler.components, unet=unet))
    few("a fox", image=smooth(8, 8), noise_level=10, **STEPS)
    with pytest.raises(InputError, match="noise_level must be a whole number from 0 to 10, got 20; try 10"):
        few("a fox", image=smooth(8, 8), **STEPS)


def test_only_models_that_enlarge_do(pipe: Pipeline, upscaler: Pipeline) -> None:
    with pytest.raises(InputError, match="a plan is for a picture and a model that enlarges"):
        pipe.upscale_plan(smooth(8, 8))
    with pytest.raises(InputError, match="scale is for models that enlarge a picture"):
        pipe("a fox", scale=4)
    with pytest.raises(InputError, match="draws a picture 4 times as large, got no image"):
        upscaler("a fox")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small picture."""
    monkeypatch.chdir(tmp_path)
    smooth(20, 12, channels=4).save("small.png")
    return tmp_path


def test_upscale_writes_beside_and_says_how(folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["upscale", "small.png", "--model", str(folder), "--steps", "2"]
    assert main(call) == 0
    assert main(call) == main([*call, "-o", "."]) == 0
    assert capsys.readouterr() == ("small-x4.png\nsmall-x4-2.png\nsmall-x4-3.png\n", "")
    smooth(40, 33).save("large.png")
    assert main(["upscale", "large.png", *call[2:], "--scale", "2", "-o", "big.png", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("latentdiff: 160x132 pixels in ")
    assert "overlapping windows of 8x8 latents, about " in captured.err and captured.err.count("\n") == 1
    report = json.loads(captured.out)
    assert report["files"] == ["big.png"] and report["settings"]["size"] == [80, 66]
    assert open_rgba("big.png").size == (80, 66)


def test_upscaled_pictures_are_replayed(folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["upscale", "small.png", "--model", str(folder), "--steps", "2", "--seed", "3", "--noise-level", "50"]
    assert main([*call, "--prompt", "a fox", "--scale", "2", "-o", "a.png"]) == 0
    record = read_record("a.png")
    assert (record["noise_level"], record["scale"], record["prompt"], record["seed"]) == (50, 2, "a fox", 3)
    assert record["guidance_scale"] == 1.0
    assert main(["replay", "a.png", "--model", str(folder)]) == 0
    assert Path("a-replay.png").read_bytes() == Path("a.png").read_bytes()
    smooth(12, 20).save("small.png")
    assert main(["replay", "a.png", "-o", "b.png", "--model", str(folder)]) == 2
    assert "small.png is no longer the image" in capsys.readouterr().err


def test_a_lora_changes_what_is_enlarged(upscaler: Pipeline, folder: Path, workplace: Path) -> None:
    save_lora(lora_of(upscaler.components), "style.safetensors", upscaler.components)
    call = ["upscale", "small.png", "--model", str(folder), "--steps", "2"]
    assert main([*call, "-o", "plain.png"]) == main([*call, "--lora", "style.safetensors:0.2", "-o", "a.png"]) == 0
    assert Path("a.png").read_bytes() != Path("plain.png").read_bytes()
    assert main(["replay", "a.png", "--model", str(folder)]) == 0
    assert Path("a-replay.png").read_bytes() == Path("a.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.png"], "cannot read image 'none.png'"),
        (["small.png", "--scale", "3"], "scale must be 2 or 4, got 3"),
        (["small.png", "--noise-level", "351"], "noise_level must be a whole number from 0 to 350"),
        (["small.png", "--steps", "0"], "num_inference_steps must be"),
        (["small.png", "--prompt", "x" * 5000], "at most 4000 characters"),
        (["small.png", "-o", "big.gif"], "-o must name a PNG, JPEG or WebP file or a folder"),
        (["small.png", "--lora", "none.safetensors"], "--lora names 'none.safetensors', and there is no such file"),
        (["animated.png"], "must be one still picture"),
        (["small.png", "--model", "BASE"], "draws pictures and enlarges none; pass a model that does"),
        ([], "required: image"),
    ],
)
def test_bad_input_is_one_line(
    built_model: Path, workplace: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save("animated.png", save_all=True, append_images=frames[1:])
    before = sorted(workplace.iterdir())
    assert main(["upscale", *(str(built_model) if text == "BASE" else text for text in options)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(workplace.iterdir()) == before


def test_generate_and_upscale_in_one(
    built_model: Path, folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--model", str(built_model), "--size", "16x16", "--upscale-model", str(folder)]
    assert main(["generate", "fox", "cat", *models, "--upscale", "--steps", "2", "--seed", "5", "-o", "a.png"]) == 0
    assert capsys.readouterr().out.split() == ["a.png", "a-2.png"]
    assert main(["generate", "cat", *models[:4], "--steps", "2", "--seed", "6", "-o", "base.png"]) == 0
    assert open_rgba("a-2.png").size == (64, 64)
    record = read_record("a-2.png")
    assert (record["prompt"], record["seed"], record["image"]["path"]) == ("cat", 6, None)
    assert record["image"]["record"]["model"] == built_model.name and record["image"]["record"]["seed"] == 6
    assert main(["upscale", "base.png", "--model", str(folder), "--prompt", "cat", "--seed", "6", "-o", "b.png"]) == 0
    assert np.abs(np.asarray(open_rgba("b.png"), int) - np.asarray(open_rgba("a-2.png"), int)).max() <= 2
    capsys.readouterr()
    models = ["--model", str(folder), "--model", str(built_model)]
    assert main(["replay", "a-2.png", *models]) == 0
    assert Path("a-2-replay.png").read_bytes() == Path("a-2.png").read_bytes()
    assert main(["generate", "fox", "--upscale-model", "x"]) == 2
    assert "got no --upscale; add it" in capsys.readouterr().err


def test_pictures_drawn_of_pictures_in_memory_are_replayed(
    pipe: Pipeline,
    upscaler: Pipeline,
    built_model: Path,
    folder: Path,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each knows what made it, until it is changed, and unless the chain is long."""
    small = Pipeline.from_pretrained(built_model, device="cpu")("a fox", seed=3, **STEPS).images[0]
    large = Pipeline.from_pretrained(folder, device="cpu")
    large("a fox", image=small, seed=3, **STEPS).save("a.png")
    models = ["--model", str(folder), "--model", str(built_model)]
    assert main(["replay", "a.png", *models]) == 0
    assert Path("a-replay.png").read_bytes() == Path("a.png").read_bytes()
    small.putpixel((3, 3), (1, 2, 3))
    large("a fox", image=small, **STEPS).save("b.png")
    capsys.readouterr()
    assert main(["replay", "b.png", *models]) == 2
    assert "the picture it was drawn of, drawn again, is no longer the image" in capsys.readouterr().err
    for _ in range(6):
        small = pipe("a fox", image=small, num_inference_steps=2).images[0]
    assert len(json.dumps(read_record(large("a fox", image=small, **STEPS).save("c.png")[0]))) < 20_000
    record = read_record("a.png")
    deep: dict[str, Any] = copy.deepcopy(record)
    for _ in range(6):
        deep = {**record, "image": {"path": None, "hash": "", "record": deep}}
    result = large("a fox", image=small, **STEPS)
    replace(result, settings={**result.settings, "image": deep["image"]}).write(0, "deep.png")
    assert main(["replay", "deep.png"]) == 2
    assert "must tell of at most 4 pictures drawn of one another" in capsys.readouterr().err
