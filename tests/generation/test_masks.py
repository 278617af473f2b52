"""Masks: what of a picture is drawn anew, and how the two meet; everything that is no mask is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.errors import InputError
from latentdiff.generation.masks import PreparedMask, hard_mask, open_mask, open_picture, prepare_mask

SIDES = (0, 0, 0, 0)


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """An opaque picture of noise, as it is after opening."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert("RGBA")


def erased(box: tuple[int, int, int, int], alpha: int = 0) -> Image.Image:
    """The same with a box of it transparent."""
    image = picture()
    image.paste((0, 0, 0, alpha), box)
    return image


def edit(given: Any, image: Image.Image | None = None, feather: int = 0, sides: Any = SIDES) -> PreparedMask:
    image = picture() if image is None else image
    painted = None if given is None else open_mask(given, image)
    return prepare_mask(image, painted, image.size, sides, feather)


def test_a_box_in_pixels_of_the_image() -> None:
    found = edit((2, 3, 10, 16))
    expected = torch.zeros(1, 1, 16, 24)
    expected[:, :, 3:16, 2:10] = 1
    assert torch.equal(found.mask, expected) and torch.equal(found.alpha, expected)
    assert found.opacity is None
    assert open_mask([2, 3, 10, 16], picture()).given == {"box": [2, 3, 10, 16]}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_painting_of_any_mode(mode: str, tmp_path: Path) -> None:
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    if mode == "I;16":
        mask = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    elif mode == "CMYK":
        mask = mask.convert("RGB").convert("CMYK")
    else:
        mask = mask.convert(mode)
    found = edit(mask).mask
    assert found[..., :12].all() and not found[..., 12:].any()
    if mode != "CMYK":
        mask.save(tmp_path / "mask.png")
        assert torch.equal(edit(tmp_path / "mask.png").mask, found)


def test_shades_of_a_painting_are_weights_of_what_is_drawn() -> None:
    shades = Image.fromarray(np.tile(np.array([[0, 3, 127, 128, 250, 255]], dtype=np.uint8), (16, 4)))
    found = edit(shades)
    assert found.alpha[0, 0, 0, :6].mul(255).round().tolist() == [0, 3, 127, 128, 250, 255]
    assert found.mask[0, 0, 0, :6].tolist() == [0, 0, 0, 1, 1, 1]
    assert open_mask(shades, picture()).given["soft"] is True
    hard = hard_mask(shades.convert("RGBA"))
    assert "soft" not in open_mask(hard, picture()).given
    assert edit(hard).alpha[0, 0, 0, :6].tolist() == [0, 0, 0, 1, 1, 1]


def test_what_is_transparent_is_drawn_and_has_no_colour() -> None:
    image = erased((0, 0, 12, 16))
    found = edit("alpha", image)
    assert found.mask[..., :12].all() and not found.alpha[..., 12:].any() and found.opacity is None
    assert torch.equal(found.kept[..., :12], found.kept[..., 12:13].expand(-1, -1, -1, 12))  # the nearest that is seen


def test_what_is_transparent_in_part_lies_over_what_is_drawn() -> None:
    found = edit("alpha", erased((0, 0, 12, 16), alpha=51))
    assert found.mask[..., :12].all()
    assert torch.allclose(found.alpha[..., :12], torch.tensor(0.8)) and not found.alpha[..., 12:].any()
    image = erased((0, 0, 4, 16))
    image.paste((9, 9, 9, 204), (4, 0, 8, 16))
    found = edit("alpha", image)
    assert found.mask[..., :4].all() and not found.mask[..., 4:].any()
    assert torch.allclose(found.alpha[..., 4:8], torch.tensor(0.2)) and not found.alpha[..., 8:].any()


@pytest.mark.parametrize("given", [(8, 0, 16, 16), "mask", "alpha", None])
def test_feathering_is_on_the_drawn_side_alone(given: Any) -> None:
    mask = Image.new("L", (24, 16))
    mask.paste(255, (8, 0, 16, 16))
    sides = (16, 0, 0, 8) if given is None else SIDES
    image = erased((8, 0, 16, 16)) if given == "alpha" else picture()
    hard, soft = (edit(mask if given == "mask" else given, image, feather, sides) for feather in (0, 3))
    assert torch.equal(hard.mask, soft.mask)
    assert not soft.alpha[soft.mask == 0].any()
    assert bool((soft.alpha[soft.mask == 1] > 0).all())
    row = soft.alpha[0, 0, 8].tolist()
    if given is None:
        assert row[:16] == [*[1.0] * 13, 0.75, 0.5, 0.25]
        assert soft.alpha[0, 0, :, 30].tolist() == [*[0.0] * 16, 0.25, 0.5, 0.75, *[1.0] * 5]
    else:
        assert row[8:16] == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]


def test_the_result_is_as_transparent_as_what_is_kept_of_the_picture() -> None:
    image = erased((0, 0, 6, 8), alpha=100)
    found = edit((0, 4, 24, 16), image)
    assert found.opacity is not None
    alpha = np.asarray(found.opacity)
    assert (alpha[:4] == np.asarray(image)[:4, :, 3]).all() and (alpha[4:] == 255).all()
    assert edit((0, 0, 12, 8), image).opacity is None  # nothing transparent is left


@pytest.mark.parametrize(
    ("given", "image", "message"),
    [
        (Image.new("L", (16, 24), 255), None, "the mask must have the size of the image, 24x16, got 16x24"),
        (Image.new("RGBA", (24, 16), (255, 255, 255, 9)), None, "the mask must be opaque, got transparent parts"),
        (Image.new("RGB", (24, 16), "red"), None, "the mask must be black and white, got colours"),
        (Image.new("F", (24, 16)), None, "got floating point"),
        ("alpha", None, "the image is opaque everywhere, so mask alpha draws nothing"),
        ("none.png", None, "cannot read mask 'none.png'"),
        (3, None, "mask must be a picture, an array or a path, got int"),
        ((1, 2, 3), None, "a mask's box must be left, top, right and bottom, got"),
        ((5, 5, 5, 9), None, "a mask's box must have left < right"),
        ((0, 9, 5, 5), None, "a mask's box must have left < right and top < bottom"),
        ((0, 0, 25, 16), None, "a mask's box must be a whole number from 0 to 24, got 25"),
        ((-1, 0, 5, 5), None, "a mask's box must be a whole number from 0 to 24, got -1"),
        ((0.5, 0, 5, 5), None, "a mask's box must be a whole number"),
    ],
)
def test_what_is_no_mask(given: Any, image: Image.Image | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_mask(given, image or picture())
    assert "\n" not in str(caught.value)


def test_animations_that_someone_else_opened_are_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.png") as opened:
        for name in ("image", "mask"):
            with pytest.raises(InputError, match=f"{name} must be one still picture, got an animation"):
                open_picture(opened, name)
    with pytest.raises(InputError, match="must be one still picture, got an animation of 2 frames"):
        open_picture(tmp_path / "a.png", "image")
    assert open_picture(None, "image") is None
