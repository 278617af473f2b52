"""What is in each scene and where: a pure function of the drawings, the seed and the number of the scene."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from typing import Any

import numpy as np

from latentdiff.evaluate.compose.grounds import COLORED, GROUNDS, PLACES, Ground
from latentdiff.evaluate.compose.words import RELATIONS, Combination, Things, is_held_out

from ...data.captions import swap_sides
from .things import Catalogue, Choice, Thing
from .words import scene_captions

NEAR = 90.0  # distance in sRGB from its ground below which a thing is not seen well
MARGIN = 0.02
KINDS = {"single": 0.34, "count": 0.18, "pair": 0.32, "sizes": 0.06, "group": 0.1}
ORDINARY_SHARE = 0.5  # of all choices of a thing, that are among the ordinary ones
GROUPS = ((2, 1), (1, 2), (1, 1, 1), (2, 2), (3, 1), (1, 1, 1, 1))
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Group:
    """One drawing, or several alike.

    Attributes:
        thing: number of the drawing in the catalogue.
        said: what captions say of it.
        turn: of its colours around the colour circle, in turns.
        mirrored: whether left and right are exchanged.
        boxes: of each, left, top, right and bottom, as shares of the side of the picture.
    """

    thing: int
    said: Things
    turn: float
    mirrored: bool
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Everything that the pixels and captions of one scene depend on but the drawings.

    Attributes:
        kind: a key of `KINDS`.
        style: of all its drawings.
        relation: of the first group to the second, one of `RELATIONS`; None where captions do not say.
        ground: a key of `GROUNDS`.
        seed: what chance there is in the ground follows from.
    """

    kind: str
    style: str
    groups: tuple[Group, ...]
    relation: str | None
    ground: str
    seed: int
    captions: tuple[str, ...] = ()

    def truth(self) -> dict[str, Any]:
        """Return what is there, for whoever measures by it."""
        things = [
            {
                "concept": group.said.name,
                "count": group.said.count,
                "color": group.said.color,
                "size": group.said.size,
                "boxes": [list(box) for box in group.boxes],
            }
            for group in self.groups
        ]
        return {"kind": self.kind, "things": things, "relation": self.relation, "ground": self.ground}

    @property
    def is_read_in_order(self) -> bool:
        """Whether captions tell by their order alone, left to right, where its different things are."""
        return len(self.groups) > 1 and self.relation in (None, "next to")

    @property
    def combinations(self) -> list[Combination]:
        """Return the combinations that are in it; see `is_held_out`."""
        found: list[Combination] = []
        for group in self.groups:
            said = group.said
            if group.turn and said.color:
                found.append(("color", said.color, said.name))
            if said.count > 1:
                found.append(("count", said.count, said.name))
        names = sorted({group.said.name for group in self.groups})
        return [*found, *(("pair", *pair) for pair in combinations(names, 2))]


def held_out_combinations(catalogue: Catalogue) -> Iterator[Combination]:
    """Yield every combination that is held out, of those that scenes could have."""
    colors = {(color, thing.concept) for thing in catalogue.things for color in allowed_turns(catalogue, thing)}
    names = catalogue.concepts
    possible: list[Combination] = [("color", *pair) for pair in sorted(colors)]
    possible += [("count", number, name) for name in names for number in (2, 3, 4)]
    yield from filter(is_held_out, possible)
    yield from filter(is_held_out, (("pair", *pair) for pair in combinations(names, 2)))


def allowed_turns(catalogue: Catalogue, thing: Thing) -> dict[str, float]:
    """Return the turns of a drawing that give its concept a colour which no drawing of that has by itself."""
    natural = catalogue.natural.get(thing.concept, set())
    return {color: turn for color, turn in thing.turns.items() if color not in natural}


def plan_scene(catalogue: Catalogue, seed: int, number: int, held_out: bool = False, captions: int = 3) -> Scene:
    """Return one scene.

    Args:
        number: of the scene; those of other numbers do not depend on it.
        held_out: whether it has a combination that is held out, or none.
        captions: how many it has.
    """
    kind = str(np.random.default_rng([seed, number]).choice(list(KINDS), p=list(KINDS.values())))
    for attempt in count():
        rng = np.random.default_rng([seed, number, held_out, attempt])
        scene = _draw_scene(catalogue, kind, rng, captions)
        if scene is not None and any(map(is_held_out, scene.combinations)) == held_out:
            return scene
    raise AssertionError("unreachable")


def _draw_scene(catalogue: Catalogue, kind: str, rng: np.random.Generator, captions: int) -> Scene | None:
    """Return a scene, or None where chance put together what does not go together."""
    counts, relation, sizes = _arrangement(kind, rng)
    things = _chosen(catalogue, len(counts), kind == "single", rng)
    if things is None:
        return None
    groups = [_group(catalogue, n, number, size, rng) for n, number, size in zip(things, counts, sizes)]
    colors = [group.said.color for group in groups]
    if len({*things}) < len(things) and (None in colors or len({*colors}) < len(colors)):
        return None
    ground = _ground(sum(counts), relation, rng)
    means = [turned_mean(catalogue.things[group.thing], group.turn) for group in groups]
    if ground in colors:
        return None
    if any(_distance(mean, GROUNDS[ground].color) < NEAR for mean in means) and ground != "white":
        return None
    placed = _placed(catalogue, groups, relation, GROUNDS[ground], rng)
    first = catalogue.things[groups[0].thing].row
    keywords = [tag for tag in first["tags"] if tag not in first["concept"].split()]
    said, phrases = [group.said for group in placed], GROUNDS[ground].phrases
    spoken = scene_captions(said, relation, phrases, first["style"], keywords, rng, captions)
    return Scene(kind, first["style"], tuple(placed), relation, ground, int(rng.integers(2**31)), tuple(spoken))


def _arrangement(kind: str, rng: np.random.Generator) -> tuple[Sequence[int], str | None, Sequence[str | None]]:
    """Return how many of each group there are, how the first is to the second, and the size word of each."""
    if kind == "single":
        return (1,), None, (str(rng.choice(["small", "big"])) if rng.random() < 0.14 else None,)
    if kind == "count":
        return (int(rng.choice([2, 3, 4], p=[0.4, 0.4, 0.2])),), None, (None,)
    if kind == "pair":
        return (1, 1), str(rng.choice(RELATIONS)), (None, None)
    if kind == "sizes":
        sizes = ("big", "small") if rng.random() < 0.5 else ("small", "big")
        return (1, 1), str(rng.choice(["left of", "right of", "next to"])) if rng.random() < 0.5 else None, sizes
    counts = GROUPS[rng.integers(len(GROUPS))]
    return counts, None, (None,) * len(counts)


def _chosen(catalogue: Catalogue, groups: int, alone: bool, rng: np.random.Generator) -> list[int] | None:
    """Return numbers of drawings of one style whose names are not part of each other; None where that failed."""
    things = catalogue.things
    first = _choice(catalogue.everything, rng)
    if not alone and not things[first].countable:
        return None
    chosen = [first]
    if groups == 2 and things[first].turns and rng.random() < 0.12:
        return [first, first]  # in two colours
    same_style = catalogue.styles[things[first].row["style"]]
    while len(chosen) < groups:
        chosen.append(_choice(same_style, rng))
    words = [set(things[n].concept.split()) for n in chosen]
    return None if any(a <= b or b <= a for a, b in combinations(words, 2)) else chosen


def _choice(things: Choice, rng: np.random.Generator) -> int:
    among = things.ordinary if things.ordinary and rng.random() < ORDINARY_SHARE else things.all
    return int(rng.choice(among))


def _group(catalogue: Catalogue, n: int, number: int, size: str | None, rng: np.random.Generator) -> Group:
    """Return some of one drawing, now and then with a colour word, for which its hue is turned where need be."""
    thing = catalogue.things[n]
    turns, color, turn = allowed_turns(catalogue, thing), None, 0.0
    if turns and rng.random() < 0.36:
        color = str(rng.choice(list(turns)))
        turn = turns[color]
    elif thing.color and rng.random() < 0.15:
        color = thing.color
    mirrored = bool(thing.row["flip"] and swap_sides(thing.concept) == thing.concept and rng.random() < 0.5)
    return Group(n, Things(thing.concept, number, color, size), turn, mirrored)


def _ground(total: int, relation: str | None, rng: np.random.Generator) -> str:
    """Choose a ground that fits: nobody stands on the grass above somebody else."""
    drawn = rng.random()
    if drawn < 0.36:
        return "white"
    if drawn < 0.62:
        return str(rng.choice(list(COLORED)))
    floating = total > 3 or relation in ("above", "under")
    return str(rng.choice([name for name, place in PLACES.items() if not (floating and place.floor)]))


def _placed(
    catalogue: Catalogue, groups: Sequence[Group], relation: str | None, ground: Ground, rng: np.random.Generator
) -> list[Group]:
    """Give every drawing of every group its box."""
    owners = [n for n, group in enumerate(groups) for _ in range(group.said.count)]
    cells = _cells(groups, relation, ground, rng)
    widths = [_shape(catalogue.things[groups[owner].thing]) for owner in owners]
    alike = [float(rng.uniform(0.86, 0.98)) for _ in groups]
    boxes: list[list[Box]] = [[] for _ in groups]
    for owner, cell, shape in zip(owners, cells, widths):
        share = alike[owner] * rng.uniform(0.95, 1.0) * _share(groups, owner, rng)
        boxes[owner].append(_fitted(cell, shape, share, ground, rng))
    return [Group(group.thing, group.said, group.turn, group.mirrored, tuple(own)) for group, own in zip(groups, boxes)]


def _share(groups: Sequence[Group], owner: int, rng: np.random.Generator) -> float:
    """Return how much of its cell a thing fills."""
    size, alone = groups[owner].said.size, len(groups) == 1 and groups[0].said.count == 1
    if alone:
        low, high = {"small": (0.3, 0.42), "big": (1.0, 1.0), None: (0.66, 0.98)}[size]
        return float(rng.uniform(low, high))
    return 1.0


def _cells(groups: Sequence[Group], relation: str | None, ground: Ground, rng: np.random.Generator) -> list[Box]:
    """Return where each thing may be, as shares of the side of the picture.

    Where captions do not say how things are to each other, they name them in the order of reading, which the cells have
    then: from left to right, those above first. So the place of each thing follows from the caption.
    """
    total = sum(group.said.count for group in groups)
    sizes = [group.said.size for group in groups]
    if total == 1:
        cells = [(0.0, 0.0, 1.0, 1.0)]
    elif all(sizes):
        edge = 0.66 if sizes[0] == "big" else 0.34
        cells = [(0.0, 0.0, edge, 1.0), (edge, 0.0, 1.0, 1.0)]
    elif relation in ("above", "under"):
        cells = [(0.15, 0.0, 0.85, 0.5), (0.15, 0.5, 0.85, 1.0)]
    elif total == 2:
        cells = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
        if relation is None and not ground.floor and rng.random() < 0.4:
            cells = [(0.0, 0.0, 0.5, 0.55), (0.5, 0.45, 1.0, 1.0)]
    elif total == 3:
        cells = [(n / 3, 0.0, (n + 1) / 3, 1.0) for n in range(3)]
        if not ground.floor and rng.random() < 0.7:
            cells = [(0.25, 0.0, 0.75, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)]
    else:
        cells = [(x, y, x + 0.5, y + 0.5) for y in (0.0, 0.5) for x in (0.0, 0.5)]
    if relation == "right of":
        cells = [(1 - right, top, 1 - left, bottom) for left, top, right, bottom in cells]
    if relation == "under" or (relation is None and total in (2, 3) and rng.random() < 0.5):
        cells = [(left, 1 - bottom, right, 1 - top) for left, top, right, bottom in cells]
    if relation is None:
        cells.sort(key=lambda cell: (total > 2 and cell[1] + cell[3] > 1, cell[0]))
    top, bottom = max(MARGIN, ground.ceiling), ground.floor or 1 - MARGIN
    across, down = 1 - 2 * MARGIN, bottom - top
    return [(MARGIN + a * across, top + b * down, MARGIN + c * across, top + d * down) for a, b, c, d in cells]


def _shape(thing: Thing) -> tuple[float, float]:
    """Return width and height of what is seen of a drawing, the longer one being 1."""
    left, top, right, bottom = thing.box
    longest = max(right - left, bottom - top)
    return (right - left) / longest, (bottom - top) / longest


def _fitted(cell: Box, shape: tuple[float, float], share: float, ground: Ground, rng: np.random.Generator) -> Box:
    """Return where in its cell a thing is: it stands where there is a floor and floats elsewhere."""
    room = cell[2] - cell[0], cell[3] - cell[1]
    side = min(room[0] / shape[0], room[1] / shape[1], 1.15 * min(room)) * share
    width, height = side * shape[0], side * shape[1]
    left = cell[0] + (room[0] - width) * rng.uniform(0.3, 0.7)
    top = cell[1] + (room[1] - height) * (rng.uniform(0.94, 1.0) if ground.floor else rng.uniform(0.3, 0.7))
    return tuple(round(float(edge), 4) for edge in (left, top, left + width, top + height))  # type: ignore[return-value]


def turned_mean(thing: Thing, turn: float) -> tuple[float, float, float]:
    """Return the mean colour of a drawing whose colours are turned, about."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in thing.mean))
    red, green, blue = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    return red * 255, green * 255, blue * 255


def _distance(color: Sequence[float], other: Sequence[float]) -> float:
    return float(np.linalg.norm(np.subtract(color, other)))
