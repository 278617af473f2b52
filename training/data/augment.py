"""Augmentations of captioned drawings; one that changes what is seen changes the caption with it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.errors import InputError, shown
from latentdiff.evaluate.compose.words import BACKGROUNDS, HUES, STYLE_PHRASES, with_article

from ..config import DataConfig
from .captions import colored, may_mirror, swap_sides
from .dataset import CaptionedImages, composite


@dataclass(frozen=True)
class Variant:
    """How one augmented picture is made of a drawing; it says everything that its pixels depend on but the drawings.

    Attributes:
        index: of the drawing.
        captions: what the result shows.
        ground: sRGB of the background.
        mirrored: whether left and right are exchanged.
        turn: of its colours around the colour circle, in turns.
        beside: index of a second drawing at its right.
        corner: rows and columns left out above and at the left of its window in the scaled drawing, mirrored if it is;
            None for its middle.
    """

    index: int
    captions: list[str]
    ground: tuple[int, int, int]
    mirrored: bool = False
    turn: float = 0.0
    beside: int | None = None
    corner: tuple[int, int] | None = None

    def condition(self, data: CaptionedImages) -> tuple[int, ...]:
        """Return what a network is told of the picture's size; see `training.data.dataset.Sample.condition`."""
        sample = data.samples[self.index]
        return sample.condition if self.corner is None else sample.condition_at(self.corner)


def plan_variants(data: CaptionedImages, index: int, config: DataConfig, seed: int) -> list[Variant]:
    """Return how each of `config.views` is made of a drawing, a pure function of the arguments."""
    variants, leeway = [], data.samples[index].leeway
    for kind, window in config.views:
        variant = plan_variant(data, index, kind, seed, config.background)
        if config.crop == "random" and any(leeway) and variant.beside is None:
            rng = np.random.default_rng([seed, data.place(index), sum(kind.encode()), 1 + window])
            top, left = (_shift(free, window, config.crops, rng) for free in leeway)
            variant = replace(variant, corner=(top, left))
        variants.append(variant)
    return variants


def _shift(free: int, window: int, windows: int, rng: np.random.Generator) -> int:
    """Draw how far a window is from the edge, 0 to `free`, in one of as many equal parts as there are windows."""
    low, high = ((free + 1) * edge // windows for edge in (window, window + 1))
    return int(rng.integers(low, max(high, low + 1)))


def draw_view(config: DataConfig, rng: np.random.Generator) -> int:
    """Draw one of `config.views`: a kind as often as the config names it, and any of its windows."""
    kinds = list(dict.fromkeys(config.variants))
    windows = len(config.views) // len(kinds)
    kind = kinds.index(config.variants[rng.integers(len(config.variants))])
    return kind * windows + (int(rng.integers(windows)) if windows > 1 else 0)


def plan_variant(data: CaptionedImages, index: int, kind: str, seed: int, background: str) -> Variant:
    """Choose how a drawing is augmented, a pure function of the arguments; no picture is looked at.

    Args:
        kind: "plain"; "flip" (mirrored, left and right exchanged in the caption); "hue" (the dominant colour turned,
            with the new colour word); "background" (a named colour behind it); "pair" (beside another drawing, "a fox
            next to a tree"). A drawing that does not allow a kind (no dominant colour, no mirror image) is left plain.
        background: CSS name or #rrggbb of the ground of the other kinds.
    """
    rng = np.random.default_rng([seed, data.place(index), sum(kind.encode())])
    row = data.rows[index]
    captions: list[str] = row["captions"]
    plain = Variant(index, captions, rgb(background))
    if kind == "flip" and row.get("flip", may_mirror(captions)):
        return replace(plain, captions=[swap_sides(c) for c in captions], mirrored=True)
    thing, own = _text(row, "thing"), _text(row, "color")
    if kind == "hue" and own in HUES and thing:
        color = str(rng.choice([name for name in HUES if name != own]))
        return replace(plain, captions=_styled(colored(thing, color), row), turn=HUES[color] - HUES[own])
    if kind == "background":
        color = str(rng.choice(list(BACKGROUNDS)))
        captions = [f"{c} on {with_article(f'{color} background')}" for c in captions]
        return replace(plain, captions=captions, ground=BACKGROUNDS[color])
    if kind == "pair" and thing:
        other = int(rng.integers(len(data)))
        beside = _text(data.rows[other], "thing")
        if beside and _text(data.rows[other], "style") == _text(row, "style"):
            return replace(plain, captions=_styled(f"{thing} next to {beside}", row), beside=other)
    return plain


def paint(data: CaptionedImages, variant: Variant) -> np.ndarray:
    """Return the picture of a variant, RGB (H, W, 3) uint8."""
    return paint_all(data, [variant])[0]


def paint_all(data: CaptionedImages, variants: Sequence[Variant]) -> list[np.ndarray]:
    """Return the pictures of variants of one drawing, each RGB (H, W, 3) uint8; the drawing is read once."""
    index = variants[0].index
    corners = [corner for corner in (_corner(data, variant) for variant in variants) if corner is not None]
    middle: Any = None if len(corners) == len(variants) else data.images[index]
    windows = iter(data.images.windows(index, corners) if corners else ())
    pictures = []
    for variant in variants:
        rgba = middle if variant.corner is None else next(windows)
        if variant.mirrored:
            rgba = rgba[:, ::-1]
        if variant.turn:
            rgba = turn_hue(rgba, variant.turn)
        if variant.beside is not None:
            rgba = side_by_side(rgba, data.images[variant.beside])
        pictures.append(composite(rgba, variant.ground))
    return pictures


def _corner(data: CaptionedImages, variant: Variant) -> tuple[int, int] | None:
    """Return what is left out above and at the left of a variant's window in the drawing before it is mirrored."""
    if variant.corner is None or not variant.mirrored:
        return variant.corner
    top, left = variant.corner
    return top, data.samples[variant.index].leeway[1] - left


def turn_hue(rgba: np.ndarray, turn: float) -> np.ndarray:
    """Rotate every colour of an RGBA picture (H, W, 4) around the colour circle by `turn` (1 is a full circle)."""
    hsv = np.array(Image.fromarray(rgba[..., :3]).convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(turn * 256)) % 256
    turned = np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))
    return np.concatenate([turned, rgba[..., 3:]], axis=-1)


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Draw two RGBA pictures (H, W, 4) at half size beside each other on one transparent canvas."""
    size = left.shape[0]
    canvas = Image.new("RGBA", (size, size))
    for column, picture in enumerate((left, right)):
        half = Image.fromarray(picture).resize((size // 2, size // 2), Image.Resampling.LANCZOS)
        canvas.paste(half, (column * (size // 2), size // 4))
    return np.asarray(canvas)


def random_view(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an RGB picture for the autoencoder: mirrored, recoloured and on a random ground, each now and then.

    Args:
        rgba: (H, W, 4) uint8.
    """
    if rng.random() < 0.5:
        rgba = rgba[:, ::-1]
    if rng.random() < 0.2:
        rgba = turn_hue(np.ascontiguousarray(rgba), rng.random())
    ground = (255, 255, 255)
    if rng.random() < 0.3:
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.random(), rng.random())
        ground = (round(red * 255), round(green * 255), round(blue * 255))
    return composite(rgba, ground)


def random_window(data: CaptionedImages, index: int, rng: np.random.Generator) -> np.ndarray:
    """Return what a frame shows of a drawing scaled to cover it, anywhere in it, RGBA (H, W, 4) uint8."""
    top, left = (int(rng.integers(free + 1)) for free in data.samples[index].leeway)
    return data.images.windows(index, [(top, left)])[0]


def rgb(color: str) -> tuple[int, int, int]:
    """Return the sRGB values of a CSS colour.

    Raises:
        InputError: it is none.
    """
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise InputError(f"data.background must be a CSS colour, got {shown(color)}; try white or #8090ff") from error


def _text(row: dict[str, Any], column: str) -> str:
    """Return what a column of a row says; nothing where that is no text."""
    value = row.get(column)
    return value if isinstance(value, str) else ""


def _styled(thing: str, row: dict[str, Any]) -> list[str]:
    style = STYLE_PHRASES.get(_text(row, "style"))
    return [thing, f"{thing}, {style}"] if style else [thing]
