"""Captions of scenes: what is there, how many, of which colour and size, where, and on which ground."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.captions import STYLE_PHRASES, with_article

NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
_IRREGULAR = {
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "wolf": "wolves",
    "leaf": "leaves",
    "elf": "elves",
    "knife": "knives",
    "scarf": "scarves",
    "foot": "feet",
    "tooth": "teeth",
    "die": "dice",
    "volcano": "volcanoes",
    "tornado": "tornadoes",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "superhero": "superheroes",
    **{same: same for same in ("sheep", "deer", "moose", "bison", "squid", "shrimp", "buffalo")},
}

# What is said of each relation of a first thing {a} to a second one {b}; the same of the second to the first below.
_RELATIONS = {
    "left of": ("{a} left of {b}", "{a} to the left of {b}", "{b} right of {a}", "{a} on the left, {b} on the right"),
    "right of": ("{a} right of {b}", "{a} to the right of {b}", "{b} left of {a}", "{b} on the left, {a} on the right"),
    "above": ("{a} above {b}", "{a} over {b}", "{b} under {a}", "{b} below {a}"),
    "under": ("{a} under {b}", "{a} below {b}", "{b} above {a}", "{a} underneath {b}"),
    "next to": ("{a} next to {b}", "{a} beside {b}", "{b} next to {a}", "{a} and {b}"),
}
RELATIONS = tuple(_RELATIONS)


@dataclass(frozen=True)
class Things:
    """One or several drawings alike: what a caption says of them.

    Attributes:
        name: of one, without article.
        count: 1 to 4.
        color: the word for it, None where the caption is silent.
        size: "big" or "small", None where the caption is silent.
    """

    name: str
    count: int = 1
    color: str | None = None
    size: str | None = None

    @property
    def phrase(self) -> str:
        """Return the noun phrase: "a fox", "two small red apples"."""
        adjectives = [word for word in (self.size, self.color) if word]
        if self.count == 1:
            noun, counted = " ".join([*adjectives, self.name]), with_article(self.name) != self.name
            return with_article(noun) if counted else noun
        return " ".join([NUMBERS[self.count], *adjectives, plural(self.name)])


def plural(name: str) -> str:
    """Return the plural of a name: "foxes", "glasses of milk", "nests with eggs"."""
    head, joint, rest = re.match(r"(.+?)( with | of | without | in | on |$)(.*)", name).groups()  # type: ignore[union-attr]
    *before, noun = re.split(r"(?<=[ -])", head)
    return "".join([*before, _plural_of_noun(noun), joint, rest])


def _plural_of_noun(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith("fish"):
        return noun
    if noun.endswith(("man", "woman")):
        return f"{noun[:-2]}en"
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def listed(phrases: Sequence[str]) -> str:
    """Join noun phrases: "a fox", "a fox and a tree", "a fox, a tree and a house"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def scene_captions(
    things: Sequence[Things],
    relation: str | None,
    ground: Sequence[str],
    style: str,
    keywords: Sequence[str],
    rng: np.random.Generator,
    count: int = 3,
) -> list[str]:
    """Return different captions of one scene, all of them true, the plainest first.

    Args:
        things: what is there.
        relation: one of `RELATIONS`, of the first of two things to the second.
        ground: ways to say where they are, "on the grass"; empty for a ground that is not worth a word.
        style: a key of `STYLE_PHRASES`.
        keywords: of the first thing.
        rng: chooses among the phrasings.
        count: how many.
    """
    phrases = [group.phrase for group in things]
    if relation is None:
        cores = [listed(phrases), listed(phrases[::-1])]
    else:
        cores = [form.format(a=phrases[0], b=phrases[1]) for form in _RELATIONS[relation]]
    captions = [_phrasing(cores[0], ground[0] if ground else "", "", rng, plain=True)]
    styled = STYLE_PHRASES[style]
    while len(captions) < count:
        core = cores[int(rng.integers(len(cores)))]
        where = ground[int(rng.integers(len(ground)))] if ground else ""
        word = keywords[int(rng.integers(len(keywords)))] if keywords and rng.random() < 0.2 else ""
        kind = ", ".join(filter(None, [word, styled if rng.random() < 0.75 else ""]))
        caption = _phrasing(core, where, kind, rng)
        if caption not in captions:
            captions.append(caption)
    return captions


def _phrasing(core: str, where: str, kind: str, rng: np.random.Generator, plain: bool = False) -> str:
    """Put together what is there, where, and how it is drawn, in one of several ways."""
    way = 0 if plain else int(rng.integers(5))
    said = f"{core} {where}" if where else core
    if way == 1:
        said = f"a drawing of {said}"
    elif way == 2:
        said = f"a picture of {said}"
    elif way == 3 and where:
        said = f"{where}, {core}"
    return f"{said}, {kind}" if kind else said
