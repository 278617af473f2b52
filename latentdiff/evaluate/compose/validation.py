"""The checker's own error rates: how often it accepts scenes whose truth is known, and refuses them with it changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.evaluate.compose.checker import Checker, look
from latentdiff.evaluate.compose.grounds import GROUNDS
from latentdiff.evaluate.compose.prompts import CATEGORIES, COLORABLE, POSITIONS, THINGS, Group, Truth, truth_from_json
from latentdiff.evaluate.compose.words import HUES, STYLE_PHRASES
from latentdiff.evaluate.intervals import Estimate, share

__all__ = ["Rates", "broken", "error_rates", "truth_of"]

ASKED = {*THINGS, *COLORABLE}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "under", "under": "above"}


@dataclass(frozen=True)
class Rates:
    """Shares of scenes of one category that are accepted: as they are, and with their truth changed."""

    accepted: Estimate
    broken_accepted: Estimate


def truth_of(row: Mapping[str, Any], category: str) -> Truth | None:
    """Return what of a scene of the data set a category looks at.

    None where the scene is not of that category, or shows a thing that the benchmark never asks for.

    Args:
        row: of metadata, with the scene's truth and style.
    """
    whole = truth_from_json(row["truth"])
    things = tuple(Group(group.concept, group.count) for group in whole.things)
    alone, two = len(things) == 1 and things[0].count == 1, [group.count for group in things] == [1, 1]
    names = {group.concept for group in things}
    if not names <= ASKED:
        return None
    if category == "color" and alone and whole.things[0].color in HUES:
        return Truth(whole.things)
    if category == "count" and len(things) == 1:
        return Truth(things)
    if category == "position" and len(names) == 2 and whole.relation in POSITIONS:
        return Truth(things, whole.relation)
    if category == "pair" and two and len(names) == 2:
        return Truth(things)
    if category == "background" and alone:
        return Truth(things, ground=whole.ground)
    if category == "style" and alone and row.get("style") in STYLE_PHRASES:
        return Truth(things, style=str(row["style"]))
    return None


def broken(truth: Truth, category: str, rng: np.random.Generator, named: bool) -> Truth:
    """Return a truth that is not that of the picture: changed in what the category is of, or in what a thing is.

    Args:
        named: whether whoever checks can tell things apart; else only what can be seen without that is changed.
    """
    first, *rest = truth.things
    if category == "position" and named:
        return replace(truth, relation=OPPOSITE[str(truth.relation)])
    if category == "position":
        return replace(truth, relation="above" if truth.relation in ("left of", "right of") else "left of")
    if category == "color" and (not named or rng.random() < 0.5):
        return replace(truth, things=(replace(first, color=_other(list(HUES), [first.color], rng)),))
    if category == "background" and (not named or rng.random() < 0.5):
        return replace(truth, ground=_other(list(GROUNDS), [truth.ground], rng))
    if category == "style":
        return replace(truth, style=_other(list(STYLE_PHRASES), [truth.style], rng))
    if category == "pair" and not named:
        return replace(truth, things=(first,))
    if category == "count" and (not named or rng.random() < 0.5):
        near = [number for number in (first.count - 1, first.count + 1) if 1 <= number <= 4]
        return replace(truth, things=(replace(first, count=int(rng.choice(near))),))
    name = _other([*THINGS, *COLORABLE], [group.concept for group in truth.things], rng)
    return replace(truth, things=(replace(first, concept=name), *rest))


def error_rates(
    scenes: Iterable[tuple[Image.Image, Mapping[str, Any]]], checker: Checker, seed: int = 0
) -> dict[str, Rates]:
    """Return the checker's rates by category.

    Args:
        scenes: pictures with their rows of metadata.
        checker: whose rates they are; one without a judge has no styles.
        seed: of what is changed in the truth.
    """
    named = checker.judge is not None
    names = [name for name in CATEGORIES if named or name != "style"]
    found: dict[str, list[tuple[bool, bool]]] = {name: [] for name in names}
    for number, (picture, row) in enumerate(scenes):
        seen = look(picture)
        for name in names:
            truth = truth_of(row, name)
            if truth is not None:
                other = broken(truth, name, np.random.default_rng([seed, number]), named)
                found[name].append((checker.check(seen, truth).right, checker.check(seen, other).right))
    return {name: Rates(_share(hits, 0), _share(hits, 1)) for name, hits in found.items()}


def _share(hits: Sequence[tuple[bool, bool]], place: int) -> Estimate:
    return share([hit[place] for hit in hits])


def _other(known: Sequence[str], not_these: Sequence[str | None], rng: np.random.Generator) -> str:
    return str(rng.choice([name for name in known if name not in not_these]))
