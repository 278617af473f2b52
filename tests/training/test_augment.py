"""Augmentations change the caption with the picture, and are pure functions of their arguments."""

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
from latentdiff.training.config import DataConfig
from latentdiff.training.data.augment import (
    BACKGROUNDS,
    draw_view,
    paint,
    paint_all,
    plan_variant,
    plan_variants,
    random_window,
    rgb,
    side_by_side,
    turn_hue,
)
from latentdiff.training.data.dataset import CaptionedImages, open_images
from latentdiff.training.data.sample import Sample
from PIL import Image

from latentdiff.errors import InputError
from latentdiff.images import fit, open_rgba


def drawing(color: tuple[int, int, int]) -> np.ndarray:
    """An opaque square in the left half of a transparent 16 px canvas."""
    rgba = np.zeros((16, 16, 4), dtype=np.uint8)
    rgba[4:12, 2:8] = (*color, 255)
    return rgba


def two_drawings() -> CaptionedImages:
    rows = [
        {"captions": ["a left hand"], "thing": "a left hand", "color": "red", "style": "noto", "flip": True},
        {"captions": ["a tree"], "thing": "a tree", "color": "green", "style": "noto", "flip": False},
    ]
    samples = [Sample(place, str(place), (16, 16), (16, 16)) for place in range(2)]
    return CaptionedImages(np.stack([drawing((230, 20, 20)), drawing((20, 180, 40))]), rows, samples)


def rendered(index: int, kind: str, seed: int) -> tuple[np.ndarray, list[str]]:
    variant = plan_variant(two_drawings(), index, kind, seed, "white")
    return paint(two_drawings(), variant), variant.captions


def test_plain_is_the_drawing_on_the_background() -> None:
    picture, captions = rendered(0, "plain", 0)
    assert captions == ["a left hand"]
    assert tuple(picture[0, 0]) == (255, 255, 255)
    assert tuple(picture[8, 4]) == (230, 20, 20)


def test_flip_mirrors_the_picture_and_the_words_where_allowed() -> None:
    picture, captions = rendered(0, "flip", 0)
    assert captions == ["a right hand"]
    assert tuple(picture[8, 11]) == (230, 20, 20)
    unchanged, captions = rendered(1, "flip", 0)
    assert captions == ["a tree"]
    assert tuple(unchanged[8, 4]) == (20, 180, 40)


def test_hue_names_the_new_color() -> None:
    picture, captions = rendered(1, "hue", 3)
    assert captions[0] != "a tree" and captions[0].endswith(" tree")
    assert tuple(picture[8, 4]) != (20, 180, 40)
    again, same = rendered(1, "hue", 3)
    assert (picture == again).all() and captions == same


def test_background_is_named_and_drawn() -> None:
    picture, captions = rendered(0, "background", 0)
    color = captions[0].removeprefix("a left hand on a ").removesuffix(" background")
    assert tuple(picture[0, 0]) == BACKGROUNDS[color]
    said = {rendered(0, "background", seed)[1][0] for seed in range(40)}
    assert "a left hand on an orange background" in said and "a left hand on a red background" in said


def test_pair_shows_and_names_both() -> None:
    seen = {rendered(0, "pair", seed)[1][0] for seed in range(12)}
    assert "a left hand next to a tree" in seen
    assert side_by_side(drawing((1, 2, 3)), drawing((4, 5, 6))).shape == (16, 16, 4)


def test_full_turn_of_the_hue_changes_nothing_and_keeps_alpha() -> None:
    rgba = drawing((230, 20, 20))
    turned = turn_hue(rgba, 1.0)
    assert (turned[..., 3] == rgba[..., 3]).all()
    assert np.abs(turned[..., :3].astype(int) - rgba[..., :3]).max() <= 3


def ramps(folder: Path, **values: object) -> tuple[CaptionedImages, DataConfig]:
    """Write pictures whose red says in which column, and whose green in which row of them a pixel is."""
    lines = []
    for index, (width, height) in enumerate([(96, 32), (32, 64), (32, 32)]):
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack([columns * 2, rows * 2, 0 * rows], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": "x"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    config = DataConfig(folder=str(folder), size=16, crop="random", variants=["plain", "flip"], **values)
    return open_images(config, 2, folder), config


def test_windows_are_where_they_say_and_not_distorted(tmp_path: Path) -> None:
    data, config = ramps(tmp_path)
    for index, scale in ((0, 2), (1, 2)):
        variants = plan_variants(data, index, config, seed=3)
        assert [variant.mirrored for variant in variants] == [False] * 4 + [True] * 4
        for variant, picture in zip(variants, paint_all(data, variants), strict=True):
            assert picture.shape == (16, 16, 3)
            assert (picture == paint(data, variant)).all()
            assert variant.corner is not None
            top, left = variant.corner
            assert variant.condition(data) == (*data.samples[index].size[::-1], top, left, 16, 16)
            shown = picture[:, ::-1] if variant.mirrored else picture
            first = 48 - 16 - left if variant.mirrored and index == 0 else left
            columns, rows = np.arange(first, first + 16) * scale + 0.5, np.arange(top, top + 16) * scale + 0.5
            assert np.abs(shown[4, 2:-2, 0] / 2 - columns[2:-2]).max() <= 1.5
            assert np.abs(shown[2:-2, 4, 1] / 2 - rows[2:-2]).max() <= 1.5
    assert all(variant.corner is None for variant in plan_variants(data, 2, config, seed=3))


def test_windows_are_spread_over_the_picture_and_follow_from_seed_and_sample(tmp_path: Path) -> None:
    data, config = ramps(tmp_path, crops=4)
    lefts = [variant.corner[1] for variant in plan_variants(data, 0, config, 3)[:4] if variant.corner]
    assert np.searchsorted([8, 16, 24], lefts, side="right").tolist() == [0, 1, 2, 3]
    assert plan_variants(data, 0, config, 3) == plan_variants(data, 0, config, 3) != plan_variants(data, 0, config, 4)
    more = config.model_copy(update={"crops": 64})
    assert {variant.corner[1] for variant in plan_variants(data, 0, more, 3) if variant.corner} == set(range(33))


def test_views_are_drawn_as_often_as_they_are_named() -> None:
    config = DataConfig(folder="x", variants=["plain", "plain", "plain", "flip"], crop="random", crops=2)
    assert config.views == [("plain", 0), ("plain", 1), ("flip", 0), ("flip", 1)]
    drawn = np.bincount([draw_view(config, np.random.default_rng([7, n])) for n in range(4000)]) / 4000
    assert drawn == pytest.approx([0.375, 0.375, 0.125, 0.125], abs=0.03)
    middle = config.model_copy(update={"crop": "center"})
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert draw_view(middle, np.random.default_rng(seed)) == int(rng.integers(4) == 3)


def test_a_random_window_is_anywhere(tmp_path: Path) -> None:
    data, _ = ramps(tmp_path)
    rng = np.random.default_rng(0)
    pictures = [random_window(data, 0, rng) for _ in range(300)]
    assert {picture.shape for picture in pictures} == {(16, 16, 4)}
    assert len({int(picture[8, 8, 0]) for picture in pictures}) == 33


def test_windows_are_those_of_the_whole_picture_scaled(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate([(96, 32), (37, 61), (20, 90), (500, 333)]):
        pixels = rng.integers(60, 200, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    lines = [json.dumps({"file_name": f"{index}.png", "text": "x"}) for index in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for zoom in (1.0, 2.5):
        data = open_images(DataConfig(folder=str(tmp_path), size=32, crop="random", zoom=zoom), 2, tmp_path)
        for index, sample in enumerate(data.samples):
            whole = np.asarray(fit(open_rgba(tmp_path / f"{index}.png"), *sample.covering), dtype=int)
            top, left = sample.leeway
            corners = [(0, 0), (top, left), (top // 2, left // 3)]
            for (row, column), found in zip(corners, data.images.windows(index, corners)):
                expected = whole[row : row + 32, column : column + 32]
                assert found.shape == (32, 32, 4)
                assert np.abs(found - expected).max() <= 2  # Pillow may scale columns before rows, or after


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (2, 10_000)])
def test_a_thin_picture_takes_no_more_memory_than_its_windows(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (200, 30, 40)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}')
    config = DataConfig(folder=str(tmp_path), size=256, crop="random", zoom=2.0, crops=2)
    data = open_images(config, 1, tmp_path)
    assert math.prod(data.samples[0].covering) * 4 > 2**30  # bytes of the whole picture
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pictures = paint_all(data, plan_variants(data, 0, config, 0))
    assert [picture[100, 100].tolist() for picture in pictures] == [[200, 30, 40]] * 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


@pytest.mark.parametrize("color", ["nocolour", "x" * 10_000, "", "#12"])
def test_what_is_no_colour_is_refused(color: str) -> None:
    with pytest.raises(InputError, match=r"data\.background must be a CSS colour"):
        rgb(color)
