"""Captions of scenes: what is there, how many, of which colour and size, where, and on which ground."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentdiff.evaluate.compose.words import RELATION_PHRASES, STYLE_PHRASES, Things, listed


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
        things: what is there; without a relation, in the order in which they are named.
        relation: one of `RELATIONS`, of the first of two things to the second.
        ground: ways to say where they are, "on the grass"; empty for a ground that is not worth a word.
        style: a key of `STYLE_PHRASES`.
        keywords: of the first thing.
        rng: chooses among the phrasings.
        count: how many.
    """
    phrases = [group.phrase for group in things]
    if relation is None:
        cores = [listed(phrases)]
    else:
        cores = [form.format(a=phrases[0], b=phrases[1]) for form in RELATION_PHRASES[relation]]
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
