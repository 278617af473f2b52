"""Draw the normal numbers that torch's CPU generator draws, to the bit, without torch.

torch fills 16 numbers and more by the Mersenne Twister and Box and Muller's transform, in blocks of 16. On x86 with
AVX2 its logarithm, sine and cosine are Cephes' polynomials in float32, with a rounding less wherever a product is added
to something. Other processors have other polynomials; `agrees_with_torch` says whether these are the ones.

Source: Matsumoto and Nishimura 1998, "Mersenne Twister"; Box and Muller 1958; Moshier 1992, Cephes, logf.c and sinf.c.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["FEWEST", "TorchNoise", "agrees_with_torch"]

FEWEST = 16  # numbers; torch draws fewer by another rule
BLOCK = 16  # of which the first half gives radii and the second angles

# Polynomials, highest power first.
LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
LOG_OF_2 = (-2.12194440e-4, 0.693359375)  # in two parts, so that multiples of the second are exact
QUARTER_OF_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # likewise, in three
HALF, ONE, TWO = (np.float32(number) for number in (0.5, 1, 2))

Number = np.ndarray | np.float32 | float


class TorchNoise:
    """The random numbers of `torch.Generator("cpu").manual_seed(seed)`.

    Args:
        seed: 0 to 2^64 - 1, of which torch uses the lower 32 bits.
    """

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)  # it is seeded as torch's is

    def draw(self, shape: Sequence[int]) -> np.ndarray:
        """Return standard normal numbers (...) float32 as `torch.randn` draws them; at least `FEWEST`."""
        size = int(np.prod(shape))
        assert size >= FEWEST, "torch draws so few by another rule"
        uniform, rest = self._uniform(size), size % BLOCK
        drawn = _normal(uniform[: size - rest])
        if rest:  # the last block is drawn once more, over what is there
            drawn = np.concatenate([drawn, uniform[size - rest :]])
            drawn[-BLOCK:] = _normal(self._uniform(BLOCK))
        return drawn.reshape(tuple(shape))

    def _uniform(self, size: int) -> np.ndarray:
        bits = self._twister.randint(0, 2**32, size=size, dtype=np.uint32)
        return (bits & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def agrees_with_torch(size: int = 1 << 14) -> bool:
    """Say whether torch, on this processor and in this version, draws the same numbers; loads torch."""
    import torch

    shapes = ((size + 3,), (BLOCK,))
    ours, theirs = TorchNoise(1), torch.Generator("cpu").manual_seed(1)
    return all(np.array_equal(ours.draw(shape), torch.randn(shape, generator=theirs).numpy()) for shape in shapes)


def fused(x: Number, y: Number, added: Number) -> np.ndarray:
    """Return x * y + added of float32 numbers, rounded once, as processors do it in one instruction."""
    exact = np.multiply(x, y, dtype=np.float64)  # no product of two float32 needs more
    return (exact + added).astype(np.float32)


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Return normal numbers (n,) of uniform ones in [0, 1), n a multiple of 16."""
    blocks = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(-TWO * _log(ONE - blocks[:, 0]))
    sine, cosine = _sine_and_cosine(np.float32(2 * np.pi) * blocks[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _log(x: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of numbers in (0, 1] as Cephes' logf has it."""
    mantissa, exponent = np.frexp(x)  # in [0.5, 1)
    small = mantissa < np.float32(0.5**0.5)
    x = mantissa - ONE + np.where(small, mantissa, np.float32(0))
    power = (exponent - small).astype(np.float32)
    square = x * x
    value = _polynomial(LOG, x) * x
    value = fused(value, square, power * np.float32(LOG_OF_2[0]))
    value = fused(-square, HALF, value)
    return fused(power, np.float32(LOG_OF_2[1]), x + value)


def _sine_and_cosine(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both of angles of at least 0 as Cephes' sinf and cosf have them."""
    octant = ((x * np.float32(4 / np.pi)).astype(np.int32) + 1) & ~1
    for part in QUARTER_OF_PI:
        x = fused(octant.astype(np.float32), np.float32(-part), x)
    square = x * x
    cosine = fused(_polynomial(COSINE, square) * square, square, -(square * HALF)) + ONE
    sine = fused(_polynomial(SINE, square) * square, x, x)
    turned = (octant & 2) != 0
    sine, cosine = np.where(turned, cosine, sine), np.where(turned, sine, cosine)
    return np.where(octant & 4, -sine, sine), np.where((octant - 2) & 4, cosine, -cosine)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    value: Number = np.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = fused(value, x, np.float32(coefficient))
    return np.asarray(value)
