"""The words of composed scenes: colours, styles, numbers and relations, and which combinations training leaves out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE_PHRASES = {
    "noto": "noto style",
    "noto-v1": "classic noto style",
    "twemoji": "twemoji style",
    "fluent-emoji-flat": "flat style",
    "emojione": "emojione style",
    "fluent-emoji-3d": "3d style",
    "fxemoji": "firefox style",
}

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")

# Backgrounds that a caption can name, as sRGB.
BACKGROUNDS = {
    "red": (229, 72, 77),
    "orange": (247, 155, 66),
    "yellow": (250, 220, 92),
    "green": (92, 184, 112),
    "blue": (84, 150, 232),
    "purple": (152, 108, 214),
    "pink": (248, 166, 196),
    "black": (24, 24, 28),
    "gray": (160, 164, 170),
}
# Where on the colour circle (turns) a hue shift may bring the dominant colour of a drawing.
HUES = {"red": 0.0, "orange": 0.08, "yellow": 0.14, "green": 0.33, "blue": 0.6, "purple": 0.76, "pink": 0.91}

# Names that take "the" (one of a kind) and names that take no article (substances, plurals without a final s).
_UNIQUE = {"sun", "milky way", "globe showing americas", "globe showing europe-africa", "globe showing asia-australia"}
_BARE = {
    *("bread", "rice", "popcorn", "butter", "salt", "cheese", "sushi", "spaghetti", "broccoli", "garlic", "honey"),
    *("bacon", "ice", "fire", "rain", "snow", "fog", "lightning", "hot springs", "cooked rice", "flatbread", "tea"),
    *("sake", "canned food", "fish and chips", "meat on bone", "money with wings", "people", "bubble tea"),
    *("breast-feeding", "cooking", "custard", "dna", "ginger root", "nail polish", "soap", "skis"),
}

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

# What is said of each relation of a first thing {a} to a second one {b}.
RELATION_PHRASES = {
    "left of": ("{a} left of {b}", "{a} to the left of {b}", "{b} right of {a}", "{a} on the left, {b} on the right"),
    "right of": ("{a} right of {b}", "{a} to the right of {b}", "{b} left of {a}", "{b} on the left, {a} on the right"),
    "above": ("{a} above {b}", "{a} over {b}", "{b} under {a}", "{b} below {a}"),
    "under": ("{a} under {b}", "{a} below {b}", "{b} above {a}", "{a} underneath {b}"),
    "next to": ("{a} next to {b}", "{a} beside {b}", "{a} and {b}"),
}
RELATIONS = tuple(RELATION_PHRASES)


HELD_OUT = 8  # per cent of all combinations
Combination = tuple[str | int, ...]


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


def with_article(name: str) -> str:
    """Return `name` as one would ask for it: "a fox", "an owl", "grapes", "the sun"."""
    if name in _UNIQUE:
        return f"the {name}"
    head = name.split(" with ")[0].split(" of ")[0]
    several = re.search(r"[^siu]s$", head) or head.split(" ")[0] in ("men", "women", "people")
    if name in _BARE or several or name[:1].isdigit():
        return name
    return ("an " if name[:1] in "aeiou" and not name.startswith(("uni", "eu", "one")) else "a ") + name


def without_article(thing: str) -> str:
    """Drop the leading article of a phrase made by `with_article`."""
    return re.sub(r"^(a|an|the) ", "", thing)


def is_held_out(combination: Combination) -> bool:
    """Say whether no training scene has a combination: by a hash of it alone.

    Args:
        combination: ("color", word, concept) of a thing that has not that colour as it is drawn, ("count", 2 to 4,
            concept), or ("pair", concept, concept), the two sorted: whose every relation is then held out.
    """
    digest = hashlib.sha256("/".join(["scenes", *map(str, combination)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT
