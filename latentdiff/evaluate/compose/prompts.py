"""Prompts of the compositional benchmark, each with its truth, and the files that hold them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.errors import InputError, shown, suggest
from latentdiff.evaluate.compose.grounds import GROUNDS
from latentdiff.evaluate.compose.words import (
    COLORS,
    HUES,
    RELATION_PHRASES,
    STYLE_PHRASES,
    Things,
    is_held_out,
    listed,
    with_article,
)
from latentdiff.files import write_file

__all__ = [
    "CATEGORIES",
    "Group",
    "Prompt",
    "Truth",
    "make_prompts",
    "prompt_from_json",
    "truth_from_json",
    "write_prompts",
]

TRIES = 10_000  # at a combination that is held out and not there yet
POSITIONS = ("left of", "right of", "above", "under")

# Ordinary things that many styles have; those below may take any colour.
THINGS = (
    *("airplane", "anchor", "avocado", "balloon", "banana", "bed", "bicycle", "bomb", "bus", "cactus", "camel"),
    *("camera", "candle", "castle", "chair", "cloud", "cookie", "cow", "crown", "dolphin", "doughnut", "dress", "duck"),
    *("elephant", "envelope", "guitar", "hamburger", "honeybee", "horse", "house", "jar", "lemon", "octopus", "onion"),
    *("peach", "pear", "penguin", "pineapple", "pizza", "rabbit", "rabbit face", "rocket", "rose", "seedling", "shark"),
    *("snail", "snowflake", "snowman", "soccer ball", "spider", "strawberry", "sunflower", "taco", "tent", "tomato"),
    *("owl", "top hat", "tulip", "umbrella", "unicorn", "watermelon", "wolf"),
)
COLORABLE = (
    *("bear", "bell", "bird", "boxing glove", "bucket", "bug", "butterfly", "cat", "crab", "deer", "drum"),
    *("fish", "frog", "giraffe", "hammer", "helicopter", "jellyfish", "key", "kite", "ladder", "lion", "lizard"),
    *("lobster", "lollipop", "magnet", "monkey", "mushroom", "notebook", "ox", "package", "pig", "pig face"),
    *("ribbon", "sailboat", "scarf", "shield", "shrimp", "snake", "speedboat", "squid", "star", "tiger", "tractor"),
    *("train", "trophy", "trumpet", "turtle", "violin", "whale"),
)
NATURAL = {  # colours that drawings of these have by themselves, so that training has seen them
    "bear": ("orange",),
    "bell": ("orange", "yellow"),
    "bird": ("red", "blue", "pink"),
    "boxing glove": ("red", "pink"),
    "bucket": ("blue",),
    "bug": ("orange", "yellow", "green", "purple"),
    "butterfly": ("orange", "blue", "purple"),
    "cat": ("orange", "yellow"),
    "crab": ("red", "orange", "pink"),
    "deer": ("orange",),
    "drum": ("red", "orange"),
    "fish": ("orange", "blue"),
    "frog": ("yellow", "green"),
    "giraffe": ("orange", "yellow"),
    "hammer": ("orange", "blue"),
    "helicopter": ("orange", "yellow"),
    "jellyfish": ("blue",),
    "key": ("orange", "yellow"),
    "kite": ("blue",),
    "ladder": ("orange",),
    "lion": ("orange", "yellow"),
    "lizard": ("green",),
    "lobster": ("red",),
    "magnet": ("red",),
    "monkey": ("red", "orange"),
    "mushroom": ("red", "orange", "pink"),
    "notebook": ("yellow", "blue", "purple"),
    "ox": ("orange",),
    "package": ("orange", "yellow"),
    "pig": ("red", "orange", "pink"),
    "pig face": ("red", "orange", "pink"),
    "ribbon": ("red", "orange", "pink"),
    "sailboat": ("orange", "blue"),
    "scarf": ("red",),
    "shield": ("blue",),
    "shrimp": ("red", "orange"),
    "snake": ("yellow", "green"),
    "speedboat": ("orange", "blue"),
    "squid": ("red", "pink"),
    "star": ("orange", "yellow"),
    "tiger": ("orange", "yellow"),
    "tractor": ("green",),
    "train": ("yellow", "blue"),
    "trophy": ("orange", "yellow"),
    "trumpet": ("orange", "yellow"),
    "turtle": ("yellow", "green"),
    "violin": ("red", "orange"),
    "whale": ("blue",),
}


@dataclass(frozen=True)
class Group:
    """One thing, or several alike.

    Attributes:
        concept: its name, without article.
        count: 1 to 4.
        color: one of `COLORS`; None where any will do.
    """

    concept: str
    count: int = 1
    color: str | None = None


@dataclass(frozen=True)
class Truth:
    """What a picture must show; nothing else is looked at.

    Attributes:
        things: all that is on the ground.
        relation: of the first thing to the second; None where any will do.
        ground: a key of `GROUNDS`; None where any will do.
        style: a key of `STYLE_PHRASES`; None where any will do.
    """

    things: tuple[Group, ...]
    relation: str | None = None
    ground: str | None = None
    style: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the truth as JSON has it, without what any value will do for."""
        groups = [{name: value for name, value in vars(group).items() if value is not None} for group in self.things]
        rest = {name: getattr(self, name) for name in ("relation", "ground", "style")}
        return {"things": groups, **{name: value for name, value in rest.items() if value is not None}}


@dataclass(frozen=True)
class Prompt:
    """A prompt of a category with its truth."""

    text: str
    category: str
    truth: Truth


def _color(rng: np.random.Generator) -> Prompt | None:
    name, color = str(rng.choice(COLORABLE)), str(rng.choice(list(HUES)))
    if color in NATURAL.get(name, ()) or not is_held_out(("color", color, name)):
        return None
    return Prompt(Things(name, 1, color).phrase, "color", Truth((Group(name, 1, color),)))


def _count(rng: np.random.Generator) -> Prompt | None:
    name, number = str(rng.choice(THINGS + COLORABLE)), int(rng.integers(1, 5))
    if number > 1 and not is_held_out(("count", number, name)):  # of a single one nothing is held out
        return None
    return Prompt(Things(name, number).phrase, "count", Truth((Group(name, number),)))


def _two(rng: np.random.Generator) -> tuple[str, str] | None:
    first, second = (str(name) for name in rng.choice(THINGS + COLORABLE, 2, replace=False))
    words = set(first.split()), set(second.split())
    if words[0] <= words[1] or words[1] <= words[0] or not is_held_out(("pair", *sorted((first, second)))):
        return None
    return first, second


def _position(rng: np.random.Generator) -> Prompt | None:
    names, relation = _two(rng), str(rng.choice(POSITIONS))
    if names is None:
        return None
    text = RELATION_PHRASES[relation][0].format(a=with_article(names[0]), b=with_article(names[1]))
    return Prompt(text, "position", Truth(tuple(map(Group, names)), relation))


def _pair(rng: np.random.Generator) -> Prompt | None:
    names = _two(rng)
    if names is None:
        return None
    return Prompt(listed([with_article(name) for name in names]), "pair", Truth(tuple(map(Group, names))))


def _background(rng: np.random.Generator) -> Prompt | None:
    name, ground = str(rng.choice(THINGS + COLORABLE)), str(rng.choice(list(GROUNDS)[1:]))  # white has no words
    text = f"{with_article(name)} {GROUNDS[ground].phrases[0]}"
    return Prompt(text, "background", Truth((Group(name),), ground=ground))


def _style(rng: np.random.Generator) -> Prompt | None:
    name, style = str(rng.choice(THINGS + COLORABLE)), str(rng.choice(list(STYLE_PHRASES)))
    text = f"{with_article(name)}, {STYLE_PHRASES[style]}"
    return Prompt(text, "style", Truth((Group(name),), style=style))


CATEGORIES: dict[str, Callable[[np.random.Generator], Prompt | None]] = {
    "color": _color,
    "count": _count,
    "position": _position,
    "pair": _pair,
    "background": _background,
    "style": _style,
}


def make_prompts(each: int, seed: int = 0) -> list[Prompt]:
    """Return prompts of all categories; what training may leave out (colours, counts, pairs) is left out by it.

    Args:
        each: prompts of every category, all different; fewer where there are not so many.
        seed: of the choice; the first prompts of a category are the same however many are asked for.
    """
    found: list[Prompt] = []
    for number, draw in enumerate(CATEGORIES.values()):
        rng, own = np.random.default_rng([seed, number]), dict[str, Prompt]()
        for _ in range(TRIES):
            if len(own) == each:
                break
            if (prompt := draw(rng)) is not None:
                own.setdefault(prompt.text, prompt)
        found += own.values()
    return found


def write_prompts(prompts: Sequence[Prompt], path: str | os.PathLike[str], seed: int = 0) -> None:
    """Write prompts as JSON lines of prompt, seed, category and truth.

    Args:
        seed: of the first picture; each further one has the next.

    Raises:
        StorageError: the file cannot be written.
    """
    rows = [
        {"prompt": one.text, "seed": seed + number, "category": one.category, "truth": one.truth.to_json()}
        for number, one in enumerate(prompts)
    ]
    write_file(Path(path), "".join(json.dumps(row) + "\n" for row in rows).encode())


def prompt_from_json(row: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a line that `write_prompts` wrote, or somebody in the same form.

    Raises:
        InputError: it is none.
    """
    category = row.get("category")
    if category not in list(CATEGORIES):
        raise InputError(f"category {shown(str(category))} is unknown{suggest(str(category), CATEGORIES)}")
    return Prompt(row["prompt"], category, truth_from_json(row.get("truth")))


def truth_from_json(tree: Any) -> Truth:
    """Return the truth of a prompt, or of a scene of the data set, whose other entries are passed over.

    Raises:
        InputError: it is none.
    """
    things = tree.get("things") if isinstance(tree, dict) else None
    if not isinstance(things, list) or not things:
        raise InputError(f"truth must be an object with things, got {shown(str(tree))}")
    groups = []
    for thing in things:
        if not isinstance(thing, dict) or not isinstance(thing.get("concept"), str):
            raise InputError(f"each of things must have a concept, got {shown(str(thing))}")
        count = thing.get("count", 1)
        if type(count) is not int or not 1 <= count <= 4:
            raise InputError(f"count must be 1 to 4, got {shown(str(count))}")
        groups.append(Group(thing["concept"], count, _one_of(thing, "color", COLORS)))
    relation = _one_of(tree, "relation", list(RELATION_PHRASES))
    if relation is not None and len(groups) != 2:
        raise InputError(f"relation is of 2 things, got {len(groups)}")
    return Truth(
        tuple(groups), relation, _one_of(tree, "ground", list(GROUNDS)), _one_of(tree, "style", list(STYLE_PHRASES))
    )


def _one_of(tree: dict[str, Any], name: str, known: Sequence[str]) -> str | None:
    value = tree.get(name)
    if value is not None and value not in known:
        raise InputError(f"{name} {shown(str(value))} is unknown; known are {', '.join(known)}")
    return value
