"""Noise on text states, so that a network draws what it has not read as what it knows that is nearest to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class TextNoise:
    """The difference of the states of two captions, added to those of a third in a share that is drawn for each sample.

    Such noise lies where states differ from one another, which noise that is alike in all directions hardly does.
    A word that no caption has is about two thirds as far from the nearest name as names are from each other.

    Source: DeVries and Taylor 2017, arXiv 1702.05538, section 3.3 (the difference of two samples' features).

    Args:
        captions: of the data, the empty one first. Those of a difference have as many words as the one it is added to.
        most: share of the difference, at most; half of the samples have none.
    """

    def __init__(self, captions: Sequence[str], most: float) -> None:
        self.most, self.words = most, [len(caption.split()) for caption in captions]
        self.alike = defaultdict[int, list[int]](list)
        for row, words in enumerate(self.words):
            self.alike[words].append(row)

    def draw(self, row: int, rng: np.random.Generator) -> tuple[float, int, int]:
        """Return the share of the difference for the caption of a row, and the rows whose difference it is."""
        share = self.most * max(0.0, rng.uniform(-1, 1))
        alike = self.alike[self.words[row]]
        one, other = (alike[place] for place in rng.integers(len(alike), size=2))
        return share, one, other

    @staticmethod
    def added(states: Tensor, shares: Sequence[float], ones: Tensor, others: Tensor) -> Tensor:
        """Return states (B, L, D) with their shares (B,) of the differences of others (B, L, D)."""
        return states + torch.tensor(shares)[:, None, None] * (ones - others)
