"""The names of the colours of pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["DOMINANT", "color_shares"]

DOMINANT = 0.45  # share of the pixels of a drawing that its colour covers


def color_shares(pixels: np.ndarray) -> dict[str, float]:
    """Return which share of some pixels each colour of `words.COLORS` covers; nothing of no pixels.

    Args:
        pixels: sRGB, (N, 3) uint8.
    """
    if len(pixels) == 0:
        return {}
    hsv = np.asarray(Image.fromarray(np.ascontiguousarray(pixels[None])).convert("HSV"), dtype=np.int32)[0]
    hue, saturation, value = hsv[:, 0] * 360 // 255, hsv[:, 1], hsv[:, 2]
    pale = saturation < 40
    named = {  # the first that applies
        "black": value < 70,
        "white": pale & (value > 215),
        "gray": pale,
        "brown": (hue < 45) & (value < 165) & (saturation > 60),
        "red": (hue < 12) | (hue >= 345),
        "orange": hue < 40,
        "yellow": hue < 68,
        "green": hue < 165,
        "blue": hue < 255,
        "purple": hue < 295,
        "pink": hue < 345,
    }
    counts = np.bincount(np.select(list(named.values()), range(len(named))), minlength=len(named))
    return {name: float(count) / len(pixels) for name, count in zip(named, counts)}
