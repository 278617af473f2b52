"""Captions: articles, colours, styles, and left/right under mirroring."""

import pytest
from latentdiff.training.data.captions import colored, may_mirror, phrase, swap_sides

from latentdiff.evaluate.compose.words import STYLE_PHRASES, with_article


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fox", "a fox"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("cactus", "a cactus"),
        ("sun", "the sun"),
        ("bread", "bread"),
        ("men wrestling", "men wrestling"),
        ("house with garden", "a house with garden"),
    ],
)
def test_article_is_the_one_people_use(name: str, expected: str) -> None:
    assert with_article(name) == expected


def test_color_word_replaces_the_one_in_the_name() -> None:
    assert colored("a fox", "blue") == "a blue fox"
    assert colored("a red apple", "green") == "a green apple"
    assert colored("grapes", "orange") == "orange grapes"


def test_phrasings_hold_thing_color_style_and_keywords() -> None:
    captions = phrase("a fox", "noto", ["animal", "fox", "sly"], "orange")
    assert captions[0] == "a fox, noto style"
    assert "fox" in captions
    assert "an orange fox" in captions
    assert "a fox, animal, sly, noto style" in captions


def test_every_keyword_is_heard_in_some_style() -> None:
    tags = ["cafe", "caffeine", "chai", "coffee", "drink", "hot", "tea"]
    heard = {tag for style in STYLE_PHRASES for tag in phrase("a hot beverage", style, tags)[-1].split(", ")}
    assert heard == set(tags) - {"hot"}
    assert phrase("a tent", "twemoji", ["camping"])[-2:] == ["a tent, camping, twemoji style", "camping"]


def test_mirrored_picture_exchanges_sides() -> None:
    assert swap_sides("a leftwards hand, right arrow") == "a rightwards hand, left arrow"
    assert swap_sides("Left of it, to the RIGHT") == "Right of it, to the LEFT"
    assert swap_sides("leftovers, a bright copyright, righteous") == "leftovers, a bright copyright, righteous"


@pytest.mark.parametrize(
    ("caption", "allowed"),
    [
        ("a red fox on the left", True),
        ("a designer with a flagstone", True),
        ("a shop with a Sign", False),
        ('a shirt that says "hello"', False),
        ("the letters of a name", False),
        ("a map of the town", False),
    ],
)
def test_writing_is_not_mirrored(caption: str, allowed: bool) -> None:
    assert may_mirror(["a thing", caption]) is allowed
