"""Whether a picture shows what it must: found by where its things are, their colours, and an image-text model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.errors import InputError
from latentdiff.evaluate.compose.colors import color_shares
from latentdiff.evaluate.compose.prompts import COLORABLE, THINGS, Group, Truth
from latentdiff.evaluate.compose.regions import SIDE, Region, find_regions
from latentdiff.evaluate.compose.words import STYLE_PHRASES, with_article
from latentdiff.images import to_tensor

__all__ = ["VERSION", "Checker", "ImageText", "Seen", "Verdict", "look"]

VERSION = 1  # of what verdicts follow from; a change of that must change it
BEST = 5  # the wanted name is among so many that fit a thing best
BEST_STYLES = 2
COLORED = 0.35  # share of a thing that has the wanted colour
MARGIN = 0.1  # around a thing that is looked at, of its longer side


class ImageText(Protocol):
    """What tells how well images and texts fit: `judge.Judge`, or what stands in for it."""

    def images(self, images: Tensor) -> Tensor:
        """Return unit vectors (N, D) of images (N, 3, H, W) in [-1, 1]."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (M, D) of texts."""


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right; the reason where it is not."""

    right: bool
    reason: str = ""


@dataclass(frozen=True)
class Seen:
    """What is found in a picture before it is known what must be there.

    Attributes:
        picture: itself.
        ground: a key of `GROUNDS`.
        regions: where its things are.
        shares: of each thing's pixels that each colour covers.
        crops: each thing alone.
    """

    picture: Image.Image
    ground: str
    regions: Sequence[Region]
    shares: Sequence[Mapping[str, float]]
    crops: Sequence[Image.Image]


def look(picture: Image.Image) -> Seen:
    """Return what is found in a picture.

    Args:
        picture: square, of any size.

    Raises:
        InputError: the picture is not square.
    """
    if picture.width != picture.height:
        raise InputError(f"a picture must be square, got {picture.width}x{picture.height}; crop it")
    pixels, ground, regions = find_regions(picture)
    shares = [color_shares(pixels[region.mask]) for region in regions]
    return Seen(picture.convert("RGB"), ground, regions, shares, [_crop(pixels, region) for region in regions])


class Checker:
    """Says whether pictures show what they must.

    Args:
        judge: tells things and styles apart; without one counts, colours, grounds, and the arrangement of two things
            are looked at, not what the things are.
    """

    def __init__(self, judge: ImageText | None = None) -> None:
        self.judge = judge
        self._texts: dict[str, Tensor] = {}

    def check(self, seen: Seen, truth: Truth) -> Verdict:
        """Say whether a picture shows what it must.

        Raises:
            InputError: it must be of a style, and there is no judge.
        """
        if truth.ground and seen.ground != truth.ground:
            return Verdict(False, f"ground is {seen.ground}, not {truth.ground}")
        wanted = [group for group in truth.things for _ in range(group.count)]
        if len(seen.regions) != len(wanted):
            return Verdict(False, f"{len(seen.regions)} things, not {len(wanted)}")
        fits = None if self.judge is None else self._fits(seen, truth, self.judge)
        order = _matched(wanted, seen.shares, fits)
        reason = next(filter(None, (_fault(group, n, seen, fits) for group, n in zip(wanted, order))), "")
        if reason:
            return Verdict(False, reason)
        if truth.relation and not _stands(seen.regions, order, truth.relation, _told_apart(truth, fits is not None)):
            return Verdict(False, f"{truth.things[0].concept} is not {truth.relation} {truth.things[1].concept}")
        if truth.style and not self._has_style(seen, truth):
            return Verdict(False, f"not in {STYLE_PHRASES[truth.style]}")
        return Verdict(True)

    def _vectors(self, texts: Sequence[str], judge: ImageText) -> Tensor:
        """Return unit vectors of texts (M, D), each computed once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            self._texts.update(zip(new, judge.texts(new)))
        return torch.stack([self._texts[text] for text in texts])

    def _fits(self, seen: Seen, truth: Truth, judge: ImageText) -> dict[str, np.ndarray]:
        """Return how well each concept fits each thing: concept -> (things,)."""
        names = list(dict.fromkeys([*(group.concept for group in truth.things), *THINGS, *COLORABLE]))
        texts = self._vectors([with_article(name) for name in names], judge)
        found = (judge.images(to_tensor(seen.crops)) @ texts.T).cpu().numpy()
        return {name: found[:, number] for number, name in enumerate(names)}

    def _has_style(self, seen: Seen, truth: Truth) -> bool:
        if self.judge is None:
            raise InputError("styles are told apart by an image-text model; pass a judge")
        thing = with_article(truth.things[0].concept)
        texts = self._vectors([f"{thing}, {phrase}" for phrase in STYLE_PHRASES.values()], self.judge)
        fits = (self.judge.images(to_tensor([seen.picture])) @ texts.T)[0]
        return int(torch.sum(fits > fits[list(STYLE_PHRASES).index(str(truth.style))])) < BEST_STYLES


def _fault(group: Group, number: int, seen: Seen, fits: Mapping[str, np.ndarray] | None) -> str:
    """Say what is wrong with the thing that is taken for a wanted one; nothing where it is right."""
    if fits is not None:
        better = sum(float(own[number]) > float(fits[group.concept][number]) for own in fits.values())
        if better >= BEST:
            return f"{max(fits, key=lambda name: float(fits[name][number]))}, not {group.concept}"
    shares = seen.shares[number]
    if group.color and shares.get(group.color, 0.0) < COLORED:
        return f"{group.concept} is {max(shares, key=lambda name: shares[name])}, not {group.color}"
    return ""


def _crop(pixels: np.ndarray, region: Region) -> Image.Image:
    """Return a thing in the middle of a white square."""
    from scipy.ndimage import binary_dilation

    mask = binary_dilation(region.mask, iterations=1)[..., None]
    left, top, right, bottom = region.box
    longest = max(right - left, bottom - top)
    side = round(longest * (1 + 2 * MARGIN))
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    alone = Image.fromarray(np.where(mask, pixels, 255).astype(np.uint8))
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(alone, (-x, -y))
    return canvas.resize((SIDE // 2, SIDE // 2), Image.Resampling.BICUBIC)


def _matched(
    wanted: Sequence[Group], shares: Sequence[Mapping[str, float]], fits: Mapping[str, np.ndarray] | None
) -> list[int]:
    """Return the number of the region of each wanted thing, so that names and colours fit as well as they can."""
    from scipy.optimize import linear_sum_assignment

    score = np.zeros((len(wanted), len(shares)))
    for row, group in enumerate(wanted):
        if fits is not None:
            score[row] += fits[group.concept]
        if group.color:
            score[row] += [own.get(group.color, 0.0) for own in shares]
    return [int(number) for number in linear_sum_assignment(-score)[1]]


def _told_apart(truth: Truth, named: bool) -> bool:
    """Say whether it is known which of two things is the first: by names, or by their colours."""
    first, second = truth.things
    return (named and first.concept != second.concept) or bool(first.color and second.color != first.color)


def _stands(regions: Sequence[Region], order: Sequence[int], relation: str, told_apart: bool) -> bool:
    """Say whether the first of two things stands to the second as it must; either way where both are alike."""
    (ax, ay), (bx, by) = regions[order[0]].center, regions[order[1]].center
    across, down = bx - ax, by - ay
    beside = abs(across) > abs(down)
    if relation == "next to":
        return beside
    along = across if relation in ("left of", "right of") else down
    toward = along > 0 if relation in ("left of", "above") else along < 0
    return beside == (relation in ("left of", "right of")) and (toward or not told_apart)
