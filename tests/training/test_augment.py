"""Augmentations change the caption with the picture, and are pure functions of their arguments."""

import numpy as np

from training.augment import BACKGROUNDS, paint, plan_variant, side_by_side, turn_hue
from training.dataset import CaptionedImages, Sample


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


def test_pair_shows_and_names_both() -> None:
    seen = {rendered(0, "pair", seed)[1][0] for seed in range(12)}
    assert "a left hand next to a tree" in seen
    assert side_by_side(drawing((1, 2, 3)), drawing((4, 5, 6))).shape == (16, 16, 4)


def test_full_turn_of_the_hue_changes_nothing_and_keeps_alpha() -> None:
    rgba = drawing((230, 20, 20))
    turned = turn_hue(rgba, 1.0)
    assert (turned[..., 3] == rgba[..., 3]).all()
    assert np.abs(turned[..., :3].astype(int) - rgba[..., :3]).max() <= 3
