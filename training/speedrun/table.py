"""The sizes that a speedrun chooses among: what is trained, at which side, and from how many samples on it is worth it.

The recipes are those of configs/, with the data, the length and what is named here changed. Samples are of a batch:
a picture seen twice counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Work:
    """How much there is of the data.

    Attributes:
        pictures: to train on.
        views: of each whose latents are computed.
        captions: different ones.
    """

    pictures: int
    views: int
    captions: int


@dataclass(frozen=True)
class Size:
    """A row of the table.

    Attributes:
        name: what plans and reports call it.
        side: of the pictures in pixels.
        recipe: of the U-Net; "" where one that is there is trained further.
        least: samples that the U-Net sees at least, below which there is nothing to look at.
        autoencoder: its recipe; "" where none is trained.
        least_autoencoder: samples that the autoencoder sees at least.
        on_cpu: whether a CPU trains it.
        model: keys of the U-Net in place of the recipe's.
        emoji: about what of the emoji there is to train on.
    """

    name: str
    side: int
    recipe: str
    least: int
    autoencoder: str = ""
    least_autoencoder: int = 0
    on_cpu: bool = True
    model: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    emoji: Work = Work(9000, 1, 36_000)


# From nothing, the smallest first; the last that fits into the time is taken. The least numbers are what each needed
# to draw what one can name: configs/emoji-diffusion.yaml saw 646,000 samples, and its autoencoder 54,000.
LATENTS = (
    Size(
        name="latents of 32 px",
        side=32,
        recipe="emoji-diffusion.yaml",
        least=40_000,
        autoencoder="emoji-autoencoder.yaml",
        least_autoencoder=8_000,
        emoji=Work(2800, 3, 15_000),
    ),
    Size(
        name="latents of 64 px",
        side=64,
        recipe="emoji-diffusion.yaml",
        least=250_000,
        autoencoder="emoji-autoencoder.yaml",
        least_autoencoder=36_000,
        emoji=Work(2800, 3, 15_000),
    ),
    Size(
        name="latents of 128 px",
        side=128,
        recipe="emoji-diffusion.yaml",
        least=1_000_000,
        autoencoder="emoji128-autoencoder.yaml",
        least_autoencoder=60_000,
        emoji=Work(2800, 3, 15_000),
    ),
    Size(
        name="latents of 128 px, large",
        side=128,
        recipe="emoji-diffusion-gpu.yaml",
        least=6_000_000,
        autoencoder="emoji-autoencoder-gpu.yaml",
        least_autoencoder=500_000,
        on_cpu=False,
    ),
)
SMALL_SIDE = 32  # pixels, up to which pictures need no autoencoder
_PIXELS = MappingProxyType({"block_out_channels": [32, 64, 128], "norm_num_groups": 16})
LEAST_FURTHER = 4_800  # samples from which on a model that is there has learnt something new


def of_pixels(side: int) -> Size:
    """Return the size of a model of the pixels themselves."""
    return Size(f"pixels, {side} px", side, "emoji-diffusion.yaml", 20_000, model=_PIXELS)


def of_embedded(side: int) -> Size:
    """Return the size of the embedded model, which is trained further."""
    return Size("the embedded model", side, "", LEAST_FURTHER)


# Of the time, after the pictures are there.
SPARE = 0.05  # for what nobody foresees
MOST_SPARE = 180.0  # seconds of it
MEASURING = 0.1  # for the evaluation, if it takes so much
AUTOENCODER = 0.3  # of what is left, where one is trained
STARTING = 20.0  # seconds, of opening and saving
BATCHES = (64, 32, 16)  # of the U-Net; the first that makes `STEPS` steps is taken
FURTHER_BATCH = 32  # at most, of a model that is there
STEPS = 400
PASSES = {False: 1000, True: 100}  # over the pictures at most, from nothing and further: more would copy them
LEAST_STEPS = 300  # however few the pictures are
GRIDS, PROMPTS = 6, 8  # sample grids over time, and the pictures of each
# A picture costs as much as so many samples of training: 25 steps, with guidance two calls each, a third of a sample
# with its backward pass, and decoding.
DRAWING = 18
DRAWN = (8, 200)  # pictures of each metric, at least and at most
SETS = 2  # of them that are drawn, at most
MOST_DRAWN = 2 * SETS * DRAWN[1]  # time for as many is kept at most: twice what they should take
