"""Inpainting by the pipeline, with a model trained for it and with any other: what is kept is kept bit for bit."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.images import open_rgba
from latentdiff.models.unet import UNet2DConditionModel
from tests.models.tiny import randomize

STEPS: dict[str, Any] = {"num_inference_steps": 2}
SIZES = [(32, 32), (40, 24), (8, 16), (72, 64)]


@pytest.fixture(scope="module")
def trained(pipe: Pipeline) -> Pipeline:
    """A model that sees the mask and what is kept."""
    unet = UNet2DConditionModel(replace(pipe.unet.config, in_channels=9)).requires_grad_(False)
    randomize(unet)
    return Pipeline(replace(pipe.components, unet=unet))


@pytest.fixture(params=["blend", "trained"])
def model(request: pytest.FixtureRequest, pipe: Pipeline, trained: Pipeline) -> Pipeline:
    return pipe if request.param == "blend" else trained


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """A picture of random bytes."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


def half(width: int, height: int) -> Image.Image:
    """A mask that is white on the right half."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_masked_comes_back_bit_for_bit(model: Pipeline, size: tuple[int, int], tmp_path: Path) -> None:
    """In pictures of the model's own size and of others, in the file too, and what is masked does not."""
    image, middle = noise(*size), size[0] // 2
    for feather in (0, 3):
        result = model("the red fox", image=image, mask=half(*size), feather=feather, seed=4, **STEPS)
        assert result.images[0].size == size and result.images[0].mode == "RGB" and result.notes == []
        (path,) = result.save(tmp_path / "a.png")
        drawn = np.asarray(Image.open(path))
        assert np.array_equal(drawn[:, :middle], np.asarray(image)[:, :middle])
        assert np.abs(pixels(result.images[0])[:, middle + 3 :] - pixels(image)[:, middle + 3 :]).mean() > 5


def test_every_value_of_a_byte_comes_back(model: Pipeline) -> None:
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(2, 0).repeat(2, 1)).convert("RGB")
    for dtype in ("float32", "bfloat16"):
        own = Pipeline(copy.deepcopy(model.components)).to(dtype=dtype)
        drawn = own("the red fox", image=image, mask=(0, 31, 32, 32), **STEPS).images[0]
        assert np.array_equal(np.asarray(drawn)[:31], np.asarray(image)[:31])


@pytest.mark.parametrize("size", SIZES[:2])
def test_transparent_pictures_keep_their_four_channels(model: Pipeline, size: tuple[int, int], tmp_path: Path) -> None:
    image, middle = noise(*size, channels=4), size[0] // 2
    result = model("the red fox", image=image, mask=half(*size), **STEPS)
    (path,) = result.save(tmp_path / "a.png")
    drawn = np.asarray(Image.open(path))
    assert drawn.shape == (size[1], size[0], 4)
    assert np.array_equal(drawn[:, :middle], np.asarray(image)[:, :middle])
    assert (drawn[:, middle:, 3] == 255).all()
    assert model("the red fox", image=image, mask=half(*size), output_type="pt", **STEPS).images.shape[1] == 3


def test_what_is_transparent_is_drawn(model: Pipeline) -> None:
    """Where the picture is transparent in part, it lies over what was drawn."""
    image = noise(32, 32).convert("RGBA")
    image.paste((1, 2, 3, 0), (0, 0, 16, 32))
    image.paste((250, 2, 3, 128), (16, 0, 18, 32))
    drawn = model("the red fox", image=image, mask="alpha", **STEPS).images[0]
    assert drawn.mode == "RGB" and np.array_equal(pixels(drawn)[:, 18:], pixels(image)[:, 18:, :3])
    assert pixels(drawn)[:, :16].std() > 1
    assert (pixels(drawn)[:, 16:18, 0] >= 124).all()
    other = image.copy()
    other.paste((200, 100, 50, 0), (0, 0, 16, 32))  # of which nothing is seen
    assert np.array_equal(pixels(model("the red fox", image=other, mask="alpha", **STEPS).images[0]), pixels(drawn))


def test_a_box_is_a_mask(model: Pipeline) -> None:
    image = noise(32, 32)
    options: dict[str, Any] = {"image": image, **STEPS}
    boxed, painted = (model("fox", mask=mask, **options).images[0] for mask in ((16, 0, 32, 32), half(32, 32)))
    assert np.array_equal(pixels(boxed), pixels(painted))


def test_outpainting_keeps_the_picture(model: Pipeline) -> None:
    image = noise(40, 24, channels=4)
    for feather in (0, 4):
        result = model("fox", image=image, outpaint={"left": 16, "bottom": 8}, feather=feather, **STEPS)
        drawn = result.images[0]
        assert drawn.size == (56, 32)
        assert np.array_equal(np.asarray(drawn)[:24, 16:], np.asarray(image))
        assert (pixels(drawn)[24:, :, 3] == 255).all() and np.ptp(pixels(drawn)[:, :8, :3]) > 10


def test_the_trained_network_sees_what_is_kept_and_nothing_else(trained: Pipeline) -> None:
    """With all of the noise, what was in the hole has no say, and what is around it has."""
    image = noise(32, 32)
    inside, outside = image.copy(), image.copy()
    inside.paste((255, 0, 0), (16, 0, 32, 32))
    outside.paste((255, 0, 0), (0, 0, 16, 32))
    first, second, third = (
        trained("fox", image=one, mask=half(32, 32), output_type="latent", **STEPS).images
        for one in (image, inside, outside)
    )
    assert torch.equal(first, second)
    assert (first - third)[..., 4:].abs().max() > 1e-3


def test_an_object_is_removed_without_a_word(model: Pipeline) -> None:
    image = noise(32, 32)
    result = model("", image=image, mask=(8, 8, 24, 24), **STEPS)
    assert np.array_equal(np.asarray(result.images[0])[:8], np.asarray(image)[:8])
    assert result.record(0)["prompt"] == "" and result.token_counts == [2]


def test_a_picture_of_odd_sides_is_scaled_and_that_is_said(model: Pipeline) -> None:
    image = noise(33, 32)
    with pytest.warns(
        RuntimeWarning, match="the image was scaled from 33x32 to 32x32 pixels; it is kept bit for bit where"
    ):
        result = model("fox", image=image, mask=half(33, 32), **STEPS)
    assert result.images[0].size == (32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who asks for a size knows
        assert model("fox", image=image, mask=half(33, 32), height=24, width=16, **STEPS).images[0].size == (16, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": noise(3, 3)}, "the image must be at least 4x4 pixels, one latent, got 3x3; enlarge it"),
        ({"image": noise(1, 10_000)}, "the image must be at least 4x4 pixels, one latent, got 1x10000"),
        ({"image": noise(4, 1000)}, "the image must be at most 16 times as long as wide, got 4x1000; cut it"),
        ({"image": noise(4, 1000), "mask": (0, 0, 2, 2)}, "at most 16 times as long as wide, got 4x1000"),
        ({"image": noise(32, 32), "mask": noise(32, 16)}, "the mask must have the size of the image"),
        ({"image": noise(257, 257), "mask": (7, 7, 8, 8)}, "the mask must have something to draw and to keep at 32x32"),
        ({"image": noise(32, 32), "mask": "alpha"}, "the image is opaque everywhere"),
        ({"image": noise(32, 32), "outpaint": {"left": 104}}, "width with outpaint must be .* to 128, got 136"),
        ({"image": noise(128, 32), "outpaint": {"top": 8, "right": 8}}, "width with outpaint must be .* got 136"),
        ({"mask": (0, 0, 8, 8)}, "a mask says which part of an image is drawn anew, got no image"),
        ({"image": noise(32, 32), "feather": 3}, "feather softens the edge of what is drawn anew, got no mask"),
        ({"image": noise(32, 32), "mask": (0, 0, 8, 8), "feather": -1}, "feather must be a whole number from 0 to 512"),
        ({"image": noise(32, 32), "mask": (0, 0, 8, 8), "outpaint": {"left": 8}}, "outpaint makes its own mask"),
    ],
)
def test_what_cannot_be_repainted_is_refused(model: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        model("the red fox", **options, **STEPS)
    assert "\n" not in str(caught.value)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture, one with transparent parts, and a mask."""
    monkeypatch.chdir(tmp_path)
    noise(32, 32).save("photo.png")
    image = noise(32, 32).convert("RGBA")
    image.paste((1, 2, 3, 0), (16, 0, 32, 32))
    image.save("erased.png")
    half(32, 32).save("mask.png")
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        ["--image", "photo.png", "--mask", "mask.png", "--feather", "2"],
        ["--image", "erased.png", "--mask", "mask.png"],
        ["--image", "erased.png", "--mask", "0,4,12,32"],
        ["--image", "erased.png", "--mask", "alpha"],
        ["--image", "photo.png", "--mask", "0,4,12,32", "--guidance", "1"],
        ["--image", "photo.png", "--outpaint", "left=8,top=16", "--feather", "4"],
    ],
)
def test_repainted_pictures_are_replayed(
    trained: Pipeline, workplace: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trained.save_pretrained("model")
    assert main(["generate", "fox", "--model", "model", "--steps", "2", "-o", "a.png", *options]) == 0
    assert main(["replay", "a.png"]) == 0
    assert Path("a-replay.png").read_bytes() == Path("a.png").read_bytes()
    source = np.asarray(open_rgba(options[1]))
    drawn = np.asarray(open_rgba("a.png"))
    left, top = (8, 16) if "--outpaint" in options else (0, 0)
    rows, columns = slice(top, top + 4), slice(left + 12, left + 16)  # kept by each of them
    assert np.array_equal(drawn[rows, columns], source[:4, 12:16])
    noise(32, 32, channels=4, seed=1).save(options[1])
    capsys.readouterr()
    assert main(["replay", "a.png", "-o", "b.png"]) == 2
    assert "is no longer the image this one was made from" in capsys.readouterr().err


def test_an_empty_prompt_is_drawn_with_an_image_and_without(
    built_model: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "", "--model", str(built_model), "--steps", "2"]
    assert main([*call, "--image", "photo.png", "--mask", "mask.png"]) == 0
    assert capsys.readouterr().out == "picture.png\n"
    assert main(["replay", "picture.png", "--model", str(built_model)]) == 0
    assert Path("picture-replay.png").read_bytes() == Path("picture.png").read_bytes()
    assert main(call) == 0  # of no text in particular, as measuring takes it
    assert main(["generate", "--model", str(built_model)]) == 2
    assert "this model needs a PROMPT, got none" in capsys.readouterr().err


def test_masks_that_are_white_or_black_everywhere_mean_all_and_nothing(model: Pipeline) -> None:
    image = noise(32, 32)
    white, black = (Image.new("L", (32, 32), shade) for shade in (255, 0))
    kept = model("the red fox", image=image, mask=black, **STEPS).images[0]
    assert np.array_equal(np.asarray(kept), np.asarray(image))
    drawn = np.asarray(model("the red fox", image=image, mask=white, feather=3, **STEPS).images[0], int)
    assert np.abs(drawn - np.asarray(image)).mean() > 5


def test_an_alpha_channel_that_was_changed_is_found(
    trained: Pipeline, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained.save_pretrained("model")
    white = Image.new("RGBA", (32, 32), "white")
    white.paste((255, 255, 255, 0), (16, 0, 32, 32))
    white.save("white.png")
    call = ["generate", "fox", "--model", "model", "--steps", "2", "-o", "a.png", "--image", "white.png"]
    assert main([*call, "--mask", "alpha"]) == 0
    white.paste((255, 255, 255, 0), (0, 0, 4, 32))
    white.save("white.png")
    capsys.readouterr()
    assert main(["replay", "a.png"]) == 2
    assert "white.png is no longer the mask this one was made from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask", "1,2,3"], "a mask's box must be left, top, right and bottom"),
        (["--mask", "1,2,3,x"], "cannot read mask '1,2,3,x'"),
        (["--feather", "2"], "feather softens the edge"),
        (["--feather", "x", "--mask", "alpha"], "invalid int value"),
        (["--mask", "alpha"], "the image is opaque everywhere"),
    ],
)
def test_bad_options_are_one_line(
    built_model: Path, workplace: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "fox", "--model", str(built_model), "--image", "photo.png", *options]) == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1
