"""The compositional benchmark: prompts that training leaves out, and a checker that tells right pictures from wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from latentdiff.errors import InputError
from latentdiff.evaluate.compose.checker import Checker, look
from latentdiff.evaluate.compose.grounds import GROUNDS, paint_ground
from latentdiff.evaluate.compose.prompts import (
    CATEGORIES,
    COLORABLE,
    NATURAL,
    THINGS,
    Group,
    Truth,
    make_prompts,
    prompt_from_json,
    write_prompts,
)
from latentdiff.evaluate.compose.validation import error_rates
from latentdiff.evaluate.compose.words import BACKGROUNDS, HUES, STYLE_PHRASES, is_held_out

SIDE = 96
DISC, SQUARE = "balloon", "package"  # what discs and squares are taken for
LEFT, RIGHT, UPPER, LOWER = (
    (0.08, 0.3, 0.42, 0.64),
    (0.58, 0.3, 0.92, 0.64),
    (0.3, 0.08, 0.64, 0.42),
    (0.3, 0.55, 0.64, 0.89),
)
MIDDLE = (0.3, 0.45, 0.7, 0.85)
ROW = ((0.04, 0.1, 0.44, 0.5), (0.56, 0.1, 0.96, 0.5), (0.04, 0.56, 0.44, 0.96), (0.56, 0.56, 0.96, 0.96))


def scene(
    *things: tuple[str, str, tuple[float, float, float, float]], ground: str = "white", side: int = SIDE
) -> Image.Image:
    """Return a picture of discs and squares: concept, colour and box of each."""
    picture = paint_ground(GROUNDS[ground], side, np.random.default_rng(77))
    draw = ImageDraw.Draw(picture)
    for concept, color, box in things:
        edges = tuple(round(edge * side) for edge in box)
        (draw.ellipse if concept == DISC else draw.rectangle)(edges, fill=BACKGROUNDS[color])
    return picture


class Shapes:
    """Stands in for the image-text model: takes discs, whose box has free corners, for one thing, squares for another.

    Its styles are told apart by the colour of the picture's middle.
    """

    def images(self, images: Tensor) -> Tensor:
        found = []
        for image in images:
            seen = (image < 0.7).any(dim=0)
            rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
            box = seen[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
            disc = float(box.float().mean() < 0.9)
            red = float(image[0, image.shape[1] // 2, image.shape[2] // 2] > 0)
            found.append([disc, 1 - disc, red, 1 - red])
        return torch.nn.functional.normalize(torch.tensor(found), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        found = []
        for text in texts:
            styled = [float(phrase in text) for phrase in (", noto style", ", twemoji style")]
            others = (
                0.0 if any(styled) or DISC in text or SQUARE in text else -2.0 if "fox" in text else -1.0
            )  # fox fits least
            found.append([float(DISC in text) + others, float(SQUARE in text) + others, *styled])
        return torch.tensor(found)


NAMED = Checker(Shapes())


@pytest.mark.parametrize("side", (64, 96, 256))
def test_a_colour_is_that_of_the_thing(side: int) -> None:
    seen = look(scene((DISC, "blue", MIDDLE), ground="yellow", side=side))
    assert NAMED.check(seen, Truth((Group(DISC, 1, "blue"),))).right
    assert NAMED.check(seen, Truth((Group(DISC, 1, "red"),))).reason == "balloon is blue, not red"


@pytest.mark.parametrize("number", (1, 2, 3, 4))
@pytest.mark.parametrize("ground", ("white", "pink", "space"))
def test_things_are_counted(number: int, ground: str) -> None:
    boxes = [(left, top + 0.1 * (top < 0.3), right, bottom) for left, top, right, bottom in ROW]
    seen = look(scene(*[(DISC, "green", box) for box in boxes[-number:]], ground=ground))
    for checker in (NAMED, Checker()):
        assert checker.check(seen, Truth((Group(DISC, number),))).right
        assert f"{number} things, not" in checker.check(seen, Truth((Group(DISC, number % 4 + 1),))).reason


def test_the_parts_of_a_thing_are_one() -> None:
    seen = look(scene((DISC, "red", (0.2, 0.4, 0.8, 0.9)), (SQUARE, "red", (0.45, 0.2, 0.55, 0.3))))
    assert Checker().check(seen, Truth((Group(DISC),))).right


@pytest.mark.parametrize(
    ("relation", "boxes"),
    [("left of", (LEFT, RIGHT)), ("right of", (RIGHT, LEFT)), ("above", (UPPER, LOWER)), ("under", (LOWER, UPPER))],
)
def test_positions_are_of_the_first_to_the_second(
    relation: str, boxes: Sequence[tuple[float, float, float, float]]
) -> None:
    seen = look(scene((DISC, "red", boxes[0]), (SQUARE, "blue", boxes[1])))
    opposite = {"left of": "right of", "right of": "left of", "above": "under", "under": "above"}[relation]
    named, colored = (Group(DISC), Group(SQUARE)), (Group(DISC, 1, "red"), Group(SQUARE, 1, "blue"))
    for checker, things in ((NAMED, named), (Checker(), colored)):
        assert checker.check(seen, Truth(things, relation)).right
        assert checker.check(seen, Truth(things, opposite)).reason == f"balloon is not {opposite} package"
    across = "above" if relation in ("left of", "right of") else "left of"
    assert not Checker().check(seen, Truth(named, across)).right


def test_both_things_of_a_pair_must_be_there() -> None:
    pair = Truth((Group(DISC), Group(SQUARE)))
    assert NAMED.check(look(scene((SQUARE, "red", LEFT), (DISC, "red", RIGHT))), pair).right
    assert not NAMED.check(look(scene((SQUARE, "red", LEFT))), pair).right
    other = Truth((Group(DISC), Group("fox")))
    assert NAMED.check(look(scene((SQUARE, "red", LEFT), (DISC, "red", RIGHT))), pair).right
    assert NAMED.check(look(scene((SQUARE, "red", LEFT), (DISC, "red", RIGHT))), other).reason.endswith("not fox")


@pytest.mark.parametrize("ground", GROUNDS)
def test_every_ground_is_recognised(ground: str) -> None:
    color = "purple" if ground in ("white", "yellow", "table", "snow", "sunset") else "yellow"
    seen = look(scene((DISC, color, MIDDLE), ground=ground))
    assert Checker().check(seen, Truth((Group(DISC),), ground=ground)).right
    other = next(name for name in GROUNDS if name != ground)
    assert Checker().check(seen, Truth((Group(DISC),), ground=other)).reason == f"ground is {ground}, not {other}"


def test_styles_are_told_apart_by_the_judge() -> None:
    seen = look(scene((DISC, "red", MIDDLE)))
    assert NAMED.check(seen, Truth((Group(DISC),), style="noto")).right
    with pytest.raises(InputError, match="judge"):
        Checker().check(seen, Truth((Group(DISC),), style="noto"))


def test_error_rates_are_of_scenes_and_of_their_truth_changed() -> None:
    def row(*things: dict[str, object], relation: str | None = None, ground: str = "white") -> dict[str, object]:
        return {"style": "noto", "truth": {"things": list(things), "relation": relation, "ground": ground}}

    disc, square = {"concept": DISC, "count": 1, "color": "red"}, {"concept": SQUARE, "count": 1, "color": None}
    scenes = [
        (scene((DISC, "red", MIDDLE), ground="blue"), row(disc, ground="blue")),
        (scene((DISC, "red", LEFT), (SQUARE, "blue", RIGHT)), row(disc, square, relation="left of")),
    ]
    rates = error_rates(scenes, Checker())
    assert set(rates) == set(CATEGORIES) - {"style"}
    for category, own in rates.items():
        assert (own.accepted.value, own.broken_accepted.value, own.accepted.n) == (1, 0, 1), category


def test_prompts_are_of_combinations_that_training_leaves_out() -> None:
    prompts = make_prompts(12)
    assert prompts == make_prompts(12) != make_prompts(12, seed=1)
    assert set(make_prompts(5)) < set(prompts)
    for category in CATEGORIES:
        assert len({one.text for one in prompts if one.category == category}) == 12
    for one in prompts:
        first, *rest = one.truth.things
        if one.category == "color":
            assert is_held_out(("color", str(first.color), first.concept))
        if one.category == "count" and first.count > 1:
            assert is_held_out(("count", first.count, first.concept))
        if rest:
            assert is_held_out(("pair", *sorted((first.concept, rest[0].concept))))
        assert one.truth.style is None or STYLE_PHRASES[one.truth.style] in one.text


def test_prompts_are_written_and_read(tmp_path: Path) -> None:
    prompts = make_prompts(3)
    write_prompts(prompts, tmp_path / "prompts.jsonl", seed=7)
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [prompt_from_json(line) for line in lines] == prompts
    assert [line["seed"] for line in lines] == [*range(7, 7 + len(prompts))]


def test_colours_that_things_have_by_themselves_are_no_test_of_composition() -> None:
    assert NATURAL.keys() <= set(COLORABLE) and not set(THINGS) & set(COLORABLE)
    assert all(set(colors) <= set(HUES) for colors in NATURAL.values())
    asked = [one.truth.things[0] for one in make_prompts(20) if one.category == "color"]
    assert asked and all(one.color not in NATURAL.get(one.concept, ()) for one in asked)


def test_pictures_that_are_not_square_are_refused() -> None:
    with pytest.raises(InputError, match="square, got 64x32"):
        look(Image.new("RGB", (64, 32)))
