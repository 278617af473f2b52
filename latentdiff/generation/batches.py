"""Say which images are drawn together, and what is to be said of their texts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from latentdiff.generation.request import Settings
from latentdiff.prompts import prompt_notes

__all__ = ["BATCH_SIZE", "make_batches", "text_notes"]

BATCH_SIZE = 4  # images, unless asked for otherwise


def make_batches(count: int, window_count: Callable[[int], int], batch_size: int = BATCH_SIZE) -> list[list[int]]:
    """Return the numbers of the images to sample together.

    Args:
        count: how many images there are.
        window_count: number of an image -> text windows that it needs; the same for all of a batch.
        batch_size: how many there are in a batch at most.
    """
    runs = [list(same) for _, same in groupby(range(count), key=window_count)]
    return [same[first : first + batch_size] for same in runs for first in range(0, len(same), batch_size)]


def text_notes(settings: Settings) -> list[str]:
    """Return notes on the texts of a request, unless brackets are plain text in them."""
    texts = dict.fromkeys([*settings.prompts, settings.negative_prompt, settings.blend_prompt])
    found = (note for text in texts for note in prompt_notes(text))
    return list(dict.fromkeys(found)) if settings.prompt_weights else []
