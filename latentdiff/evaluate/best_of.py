"""Keep of several pictures the one that fits its prompt best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from latentdiff.evaluate.judge import Judge
from latentdiff.images import to_tensor

if TYPE_CHECKING:
    from latentdiff.generation.result import GeneratedImage

__all__ = ["keep_best", "scores"]


def scores(judge: Judge, images: Iterable[GeneratedImage]) -> list[float]:
    """Return how well each picture fits its prompt, -1 to 1."""
    given = list(images)
    return judge.fits(to_tensor([one.image.convert("RGB") for one in given]), [one.prompt for one in given]).tolist()


def keep_best(judge: Judge, images: Iterable[GeneratedImage], among: int) -> Iterator[GeneratedImage]:
    """Yield the best of each so many pictures in a row, which are of one prompt; the first of equally good ones.

    What is kept says its own seed, by which it is generated again alone.
    """
    rest = iter(images)
    while group := list(islice(rest, among)):
        found = scores(judge, group)
        yield group[found.index(max(found))]
