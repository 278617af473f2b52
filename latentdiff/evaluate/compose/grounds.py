"""What is behind the things of a scene: one colour, or a simple place drawn of bands, discs and dots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from latentdiff.evaluate.compose.words import BACKGROUNDS, with_article

FINER = 3  # times the size of the picture at which places are drawn
Color = tuple[int, int, int]
Painter = Callable[[Image.Image, ImageDraw.ImageDraw, np.random.Generator], None]

SKY, NIGHT, SPACE, GRAY_SKY = (186, 225, 250), (28, 38, 92), (16, 14, 30), (176, 190, 205)
SUN, MOON = (255, 205, 60), (250, 235, 170)


@dataclass(frozen=True)
class Ground:
    """One kind of ground.

    Attributes:
        phrases: ways to say it, the plainest first; none for white.
        color: about what is behind things, as sRGB: what they must differ from.
        floor: share of the height at which things stand; None where they may be anywhere.
        ceiling: share of the height at the top that things leave free.
        paint: draws the place on its colour; None for one colour alone.
    """

    phrases: tuple[str, ...]
    color: Color
    floor: float | None = None
    ceiling: float = 0.0
    paint: Painter | None = None


def paint_ground(ground: Ground, size: int, rng: np.random.Generator) -> Image.Image:
    """Return the ground of a square picture of `size` pixels, RGB."""
    if ground.paint is None:
        return Image.new("RGB", (size, size), ground.color)
    picture = Image.new("RGB", (size * FINER, size * FINER), ground.color)
    ground.paint(picture, ImageDraw.Draw(picture), rng)
    return picture.resize((size, size), Image.Resampling.BOX)


def _band(color: Color, top: float, bend: float = 0.04) -> Painter:
    """Return what draws the ground from `top` (a share of the height) down, with an edge bent by `bend` of it."""

    def paint(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
        side = picture.width
        x = np.linspace(0, 1, 33)
        wave = np.sin((x * rng.uniform(0.4, 1.1) + rng.random()) * 2 * np.pi) if bend else 0 * x
        edge = [(float(a * side), float((top + bend * b) * side)) for a, b in zip(x, wave)]
        draw.polygon([*edge, (side, side), (0, side)], fill=color)

    return paint


def _gradient(upper: Color, lower: Color, until: float = 1.0) -> Painter:
    def paint(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
        share = np.clip(np.linspace(0, 1, picture.height) / until, 0, 1)[:, None, None]
        rows = (np.array(upper) * (1 - share) + np.array(lower) * share).round().astype(np.uint8)
        picture.paste(Image.fromarray(np.broadcast_to(rows, (picture.height, picture.width, 3)).copy()))

    return paint


def _dots(count: int, radius: tuple[float, float], color: Color, lowest: float = 1.0) -> Painter:
    def paint(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
        for _ in range(count):
            _disc(picture, draw, (rng.random(), rng.random() * lowest), rng.uniform(*radius), color)

    return paint


def _sun(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Draw a disc with rays in an upper corner."""
    side, center, radius = picture.width, (rng.choice([0.16, 0.84]), 0.15), 0.085
    for angle in np.arange(8) * np.pi / 4 + rng.random():
        ends = [(center[0] + r * np.cos(angle), center[1] + r * np.sin(angle)) for r in (radius * 1.3, radius * 1.75)]
        draw.line([(float(x * side), float(y * side)) for x, y in ends], fill=SUN, width=round(0.022 * side))
    _disc(picture, draw, center, radius, SUN)


def _moon(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Draw a crescent in an upper corner."""
    x = rng.choice([0.16, 0.84])
    _disc(picture, draw, (x, 0.15), 0.09, MOON)
    _disc(picture, draw, (x + 0.05, 0.125), 0.075, NIGHT)


def _rain(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    side = picture.width
    for column in range(7):
        for row in range(6):
            x, y = (column + rng.uniform(0.2, 0.8)) / 7, (row + rng.uniform(0.1, 0.6)) / 6
            line = [(x * side, y * side), ((x - 0.025) * side, (y + 0.075) * side)]
            draw.line(line, fill=(96, 136, 190), width=round(0.014 * side))


def _rainbow(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    radius = 0.56
    for color in ((232, 64, 60), (248, 152, 50), (252, 222, 80), (90, 185, 95), (70, 140, 230), (150, 100, 210), SKY):
        _disc(picture, draw, (0.5, 0.62), radius, color)
        radius -= 0.033


def _waves(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    side = picture.width
    for row, color in enumerate(((72, 148, 226), (54, 124, 208))):
        x = np.linspace(0, 1, 65)
        y = 0.7 + 0.12 * row + 0.02 * np.abs(np.sin((x * 4 + rng.random()) * np.pi))
        edge = [(float(a * side), float(b * side)) for a, b in zip(x, y)]
        draw.polygon([*edge, (side, side), (0, side)], fill=color)


def _planets(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x = rng.choice([0.14, 0.86])
    _disc(picture, draw, (x, 0.14), 0.08, (206, 128, 84))
    _disc(picture, draw, (1 - x, 0.1), 0.045, (120, 150, 220))


def _half_sun(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _disc(picture, draw, (rng.uniform(0.3, 0.7), 0.72), 0.2, (255, 226, 120))


def _disc(
    picture: Image.Image, draw: ImageDraw.ImageDraw, center: tuple[float, float], radius: float, color: Color
) -> None:
    side = picture.width
    x, y = float(center[0]) * side, float(center[1]) * side
    draw.ellipse((x - radius * side, y - radius * side, x + radius * side, y + radius * side), fill=color)


def _all(*painters: Painter) -> Painter:
    """Return what draws one thing after the other."""

    def paint(picture: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
        for painter in painters:
            painter(picture, draw, rng)

    return paint


WHITE = Ground((), (255, 255, 255))
COLORED = {
    name: Ground(tuple(f"{word} {with_article(f'{name} background')}" for word in ("on", "against")), color)
    for name, color in BACKGROUNDS.items()
}
PLACES = {
    "grass": Ground(("on the grass", "in a meadow"), SKY, 0.9, paint=_band((112, 190, 92), 0.7)),
    "sand": Ground(("on the sand", "in the desert"), SKY, 0.9, paint=_band((238, 208, 142), 0.7)),
    "snow": Ground(
        ("in the snow", "on a snowy day"),
        GRAY_SKY,
        0.9,
        paint=_all(_band((248, 250, 253), 0.72), _dots(26, (0.008, 0.014), (255, 255, 255))),
    ),
    "sea": Ground(("on the sea", "on the water"), SKY, 0.86, paint=_waves),
    "table": Ground(("on a table", "on a wooden table"), (246, 234, 214), 0.88, paint=_band((176, 118, 72), 0.74, 0)),
    "night": Ground(
        ("at night", "under the moon and the stars"),
        NIGHT,
        ceiling=0.27,
        paint=_all(_dots(22, (0.005, 0.01), (255, 250, 215)), _moon),
    ),
    "sun": Ground(("under the sun", "on a sunny day"), SKY, 0.92, 0.3, _all(_sun, _band((132, 200, 104), 0.8))),
    "rain": Ground(("in the rain", "on a rainy day"), GRAY_SKY, paint=_rain),
    "rainbow": Ground(("under a rainbow",), SKY, 0.93, 0.33, _all(_rainbow, _band((112, 190, 92), 0.8))),
    "sunset": Ground(
        ("at sunset", "in front of the setting sun"),
        (250, 160, 100),
        0.92,
        paint=_all(_gradient((244, 110, 110), (255, 190, 100), 0.75), _half_sun, _band((92, 62, 92), 0.76, 0.02)),
    ),
    "space": Ground(
        ("in space", "among planets and stars"),
        SPACE,
        ceiling=0.22,
        paint=_all(_dots(30, (0.004, 0.009), (240, 240, 255)), _planets),
    ),
}
GROUNDS = {"white": WHITE, **COLORED, **PLACES}
