"""Whether a picture shows what it must: found by where its things are, their colours, and an image-text model."""

from __future__ import annotations

from collections.abc import Sequence
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

__all__ = ["VERSION", "ImageText", "Verdict", "check"]

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


def check(picture: Image.Image, truth: Truth, judge: ImageText | None = None) -> Verdict:
    """Say whether a picture shows what it must.

    Args:
        picture: square, of any size.
        truth: what it must show.
        judge: tells things and styles apart; without one counts, colours, grounds, and the arrangement of two things
            are looked at, not what the things are.

    Raises:
        InputError: the picture is not square, or of a style without a judge.
    """
    if picture.width != picture.height:
        raise InputError(f"a picture must be square, got {picture.width}x{picture.height}; crop it")
    if truth.style and judge is None:
        raise InputError("styles are told apart by an image-text model; pass a judge")
    pixels, ground, regions = find_regions(picture)
    if truth.ground and ground != truth.ground:
        return Verdict(False, f"ground is {ground}, not {truth.ground}")
    wanted = [group for group in truth.things for _ in range(group.count)]
    if len(regions) != len(wanted):
        return Verdict(False, f"{len(regions)} things, not {len(wanted)}")
    shares = [color_shares(pixels[region.mask]) for region in regions]
    fits = None if judge is None else _fits(pixels, regions, truth, judge)
    order = _matched(wanted, shares, fits)
    for group, number in zip(wanted, order):
        if fits is not None and _rank(fits, group.concept, number) >= BEST:
            best = max(fits, key=lambda name: float(fits[name][number]))
            return Verdict(False, f"{best}, not {group.concept}")
        if group.color and shares[number].get(group.color, 0.0) < COLORED:
            best = max(shares[number], key=lambda name: shares[number][name])
            return Verdict(False, f"{group.concept} is {best}, not {group.color}")
    if truth.relation and not _stands(regions, order, truth.relation, _told_apart(truth, fits is not None)):
        return Verdict(False, f"{truth.things[0].concept} is not {truth.relation} {truth.things[1].concept}")
    if truth.style and judge is not None and not _has_style(picture, truth, judge):
        return Verdict(False, f"not in {STYLE_PHRASES[truth.style]}")
    return Verdict(True)


def _fits(pixels: np.ndarray, regions: Sequence[Region], truth: Truth, judge: ImageText) -> dict[str, np.ndarray]:
    """Return how well each concept fits each region: concept -> (regions,)."""
    names = list(dict.fromkeys([*(group.concept for group in truth.things), *THINGS, *COLORABLE]))
    images = judge.images(to_tensor([_crop(pixels, region) for region in regions]))
    found = (images @ judge.texts([with_article(name) for name in names]).T).cpu().numpy()
    return {name: found[:, number] for number, name in enumerate(names)}


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


def _rank(fits: dict[str, np.ndarray], concept: str, number: int) -> int:
    """Return how many other concepts fit a region better."""
    return sum(float(own[number]) > float(fits[concept][number]) for own in fits.values())


def _matched(
    wanted: Sequence[Group], shares: Sequence[dict[str, float]], fits: dict[str, np.ndarray] | None
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


def _has_style(picture: Image.Image, truth: Truth, judge: ImageText) -> bool:
    thing = with_article(truth.things[0].concept)
    texts = judge.texts([f"{thing}, {phrase}" for phrase in STYLE_PHRASES.values()])
    fits = (judge.images(to_tensor([picture.convert("RGB")])) @ texts.T)[0]
    own = fits[list(STYLE_PHRASES).index(str(truth.style))]
    return int(torch.sum(fits > own)) < BEST_STYLES
