"""The drawings that scenes are made of, and what of each is seen: where it is, how light, which colours it may take."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from latentdiff.evaluate.compose.prompts import COLORABLE, THINGS
from latentdiff.evaluate.compose.words import COLORS, HUES, with_article

from ...data.augment import turn_hue
from ..emoji import dominant_color


def _names(text: str) -> frozenset[str]:
    return frozenset(" ".join(text.split()).split("; "))


# Groups of drawings that are ever in a scene; those of the others are signs, flags and times.
GROUPS = ("activities", "animals-nature", "food-drink", "objects", "people-body", "smileys-emotion", "travel-places")
# Subgroups of things that can be counted and have a place beside others.
SUBGROUPS = _names("""
animal-mammal; animal-bird; animal-bug; animal-marine; animal-amphibian; animal-reptile; plant-flower; plant-other;
food-fruit; food-vegetable; food-prepared; food-sweet; food-asian; drink; dishware; sport; musical-instrument;
award-medal; game; event; transport-ground; transport-water; transport-air; place-building; clothing; tool; household;
light-video; computer; lock; phone; science; heart; face-costume; hotel; mail; writing; money; music
""")
# And single ones of other subgroups.
MORE = _names("""
cloud; star; snowman; snowflake; umbrella; closed umbrella; crescent moon; ringed planet; comet; tornado; tent;
fountain; ferris wheel; roller coaster; circus tent; mountain; volcano; desert island; compass; alarm clock; watch;
framed picture; artist palette; paperclip; pushpin; briefcase; clipboard; wastebasket; open book; closed book;
notebook; scroll; bone; brain; eye; ear; nose; foot; baby; boy; girl; man; woman; old man; old woman; astronaut;
detective; cook; farmer; firefighter; ninja; prince; princess; pilot; police officer; singer; student; teacher;
artist; judge; mechanic; scientist; guard; elf; fairy; genie; mage; mermaid; superhero; vampire; zombie; troll;
grinning face; smiling face; crying face; angry face; sleeping face; winking face; thinking face; church; mosque;
bell; loudspeaker; syringe; pill
""")
# Of the subgroups of things: substances, doings, more than one thing, marks, and what would be misread in a scene.
NOT = _names("""
wing; feather; pig nose; microbe; spider web; leaf fluttering in wind; sheaf of rice; herb; fish cake with swirl;
cooking; custard; curry rice; oden; mate; pouring liquid; ginger root; leafy green; shaved ice; bowling; badminton;
tennis; ping pong; lacrosse; field hockey; ice hockey; cricket game; flag in hole; moon viewing ceremony; club suit;
diamond suit; heart suit; spade suit; mahjong red dragon; construction; motorway; station; railway track; metro;
mountain railway; light rail; building construction; brick; wood; wedding; statue of liberty; tokyo tower; link;
chains; soap; low battery; inbox tray; outbox tray; bubbles; hair pick; santa claus; garlic; musical score; place of
worship; heart exclamation; mending heart; revolving hearts; cut of meat; rosette; bus stop; suspension railway;
mountain cableway; aerial tramway; guide dog; service dog; locked with key; locked with pen; e-mail; chart increasing
with yen; nail polish; egg; mobile phone with arrow; envelope with arrow; love letter; heart decoration; heart with
ribbon; incoming envelope; airplane arrival; airplane departure; memo; locked; unlocked; luggage; dna; magnifying glass
tilted left; magnifying glass tilted right; level slider; skis; baguette bread; falafel; coral; fried shrimp; green
salad; small airplane; steaming bowl; video game; fondue
""")
ORDINARY = frozenset((*THINGS, *COLORABLE))  # which half of all places in scenes go to
BRIGHT = 185  # value, of 255, that yellow needs to be seen as such
ONE_HUE = 0.7  # share of the colourful pixels of a drawing that must be near its main hue for it to have one


@dataclass(frozen=True)
class Thing:
    """One drawing, as scenes use it.

    Attributes:
        file: its PNG file, RGBA.
        row: its row of metadata.
        box: left, top, right and bottom of what is not transparent, in pixels.
        mean: mean colour of that, as sRGB.
        turns: by how much its colours are to be turned (1 is a full circle) for it to have each of these colours.
    """

    file: Path
    row: dict[str, Any]
    box: tuple[int, int, int, int]
    mean: tuple[float, float, float]
    turns: dict[str, float]

    @property
    def concept(self) -> str:
        return str(self.row["concept"])

    @property
    def color(self) -> str | None:
        """Return the colour word for it as it is drawn, where it has one that its name does not say."""
        return None if set(self.concept.split()) & set(COLORS) else self.row["color"]

    @property
    def countable(self) -> bool:
        """Whether there may be several of it in a scene, or other things beside it."""
        return is_countable(self.row)


@dataclass(frozen=True)
class Choice:
    """Numbers of things to choose among, and of those the ordinary ones, which people ask for first."""

    all: list[int]
    ordinary: list[int]


@dataclass(frozen=True)
class Catalogue:
    """The things of each style, and the colours that each concept has somewhere without being turned."""

    things: list[Thing]
    natural: dict[str, set[str]]

    @property
    def concepts(self) -> list[str]:
        """Return the concepts of which there may be several in a scene, sorted."""
        return sorted({thing.concept for thing in self.things if thing.countable})

    @cached_property
    def everything(self) -> Choice:
        """Return all things."""
        return self._choice(list(range(len(self.things))))

    @cached_property
    def styles(self) -> dict[str, Choice]:
        """Return the things of each style that there may be several of in a scene."""
        found: dict[str, list[int]] = defaultdict(list)
        for n, thing in enumerate(self.things):
            if thing.countable:
                found[thing.row["style"]].append(n)
        return {style: self._choice(numbers) for style, numbers in found.items()}

    def _choice(self, numbers: list[int]) -> Choice:
        return Choice(numbers, [n for n in numbers if self.things[n].concept in ORDINARY])


def catalogue(rows: Sequence[dict[str, Any]], folder: Path, workers: int | None = None) -> Catalogue:
    """Look at the drawings in a folder that may be in a scene.

    Args:
        rows: of the folder's metadata.
        workers: processes; the number of cores when None.
    """
    rows = sorted((row for row in rows if is_wanted(row)), key=lambda row: row["file_name"])
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        found = pool.map(partial(examine, folder), rows, chunksize=32)
        things = list(tqdm(found, total=len(rows), desc="things", unit="drawing"))
    natural: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["color"]:
            natural[row["concept"]].add(row["color"])
    for name in {row["concept"] for row in rows}:  # "blue heart" is a concept of its own
        words = name.split()
        for color in set(words) & set(COLORS):
            natural[" ".join(word for word in words if word != color)].add(color)
    return Catalogue(things, dict(natural))


def is_wanted(row: dict[str, Any]) -> bool:
    """Say whether a drawing is ever in a scene: not signs and flags, and of people only one skin tone."""
    return row["group"] in GROUPS and not row["variant"] and row["subgroup"] != "time" and ":" not in row["concept"]


def is_countable(row: dict[str, Any]) -> bool:
    """Say whether a drawing is of one thing of which there may be several."""
    name = row["concept"]
    if name in NOT or not re.fullmatch(r"[a-z][a-z -]*", name) or " and " in name or re.match("(two|four)[ -]", name):
        return False
    return (row["subgroup"] in SUBGROUPS or name in MORE) and with_article(name).startswith(("a ", "an "))


def examine(folder: Path, row: dict[str, Any]) -> Thing:
    """Return what of a drawing is seen."""
    file = folder / row["file_name"]
    with Image.open(file) as image:
        rgba = np.asarray(image.convert("RGBA"))
    rows, columns = np.nonzero(rgba[..., 3] > 24)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    mean = rgba[rgba[..., 3] > 127][:, :3].mean(axis=0)
    turns = possible_turns(rgba) if may_be_turned(row) else {}
    return Thing(file, row, box, (float(mean[0]), float(mean[1]), float(mean[2])), turns)


def may_be_turned(row: dict[str, Any]) -> bool:
    """Say whether another colour leaves a drawing what it is: not of people and faces, nor where its name has one."""
    named = set(row["concept"].split()) & {*COLORS, "rainbow", "gold", "silver", "polar"}
    return is_countable(row) and row["group"] != "people-body" and not named


def possible_turns(rgba: np.ndarray) -> dict[str, float]:
    """Return by how much the colours of a drawing are to be turned so that its main hue is that of each colour word.

    Args:
        rgba: (H, W, 4) uint8.

    Returns:
        Only the colours that are then recognised by `dominant_color`; none where there is no main hue.
    """
    rgba = np.ascontiguousarray(rgba[::2, ::2])  # enough to tell, and four times as fast
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV"), dtype=np.float64)
    opaque = rgba[..., 3] > 127
    vivid = opaque & (hsv[..., 1] > 70) & (hsv[..., 2] > 60)
    if vivid.sum() < 0.5 * opaque.sum():
        return {}
    angles = hsv[..., 0][vivid] / 256 * 2 * np.pi
    main = np.angle(np.exp(1j * angles).mean())
    if (np.abs(np.angle(np.exp(1j * (angles - main)))) < 0.5).mean() < ONE_HUE:
        return {}
    turns = {color: round(float(hue - main / (2 * np.pi)) % 1, 3) for color, hue in HUES.items()}
    dark = bool(np.median(hsv[..., 2][vivid]) < BRIGHT)
    left_out = {dominant_color(rgba), *(("orange", "yellow", "pink") if dark else ())}  # which dark are other colours
    turns = {color: turn for color, turn in turns.items() if color not in left_out}
    return {color: turn for color, turn in turns.items() if dominant_color(turn_hue(rgba, turn)) == color}
