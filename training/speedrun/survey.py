"""Look at the pictures of a speedrun: how many, how large, with which captions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from latentdiff.checkpoints import embedded_model
from latentdiff.models.tokenizer import Tokenizer

from ..config import DataConfig
from ..data.dataset import captions_of
from ..data.examine import examined
from ..data.source import MissingSplitError, Source
from ..data.sources import open_source

HELD_OUT = 0.1  # share of the pictures that is measured by, where there are enough
ENOUGH = 200
ASKED = 500  # different words that are looked up
# Share of words in pieces above which captions are hardly English: those of drawings have 0.26, of German, French and
# Polish ones 0.83, 0.56 and 1.
STRANGE = 0.4
LETTERS = 4  # of words that are looked up, as shorter ones of many languages are in every vocabulary


@dataclass(frozen=True)
class Survey:
    """What is known of pictures before anything is trained.

    Attributes:
        pictures: how many can be used.
        side: the median of their shorter sides, in pixels.
        captions: how many different ones; 0 where there are none.
        strange: share of their words that the embedded text encoder does not know as wholes.
        split: whether some are set apart as a validation split.
        digest: changes when the pictures do.
    """

    pictures: int
    side: int
    captions: int
    strange: float
    split: bool
    digest: str

    @property
    def held_out(self) -> float:
        """Share of the pictures that is to be held out."""
        return 0.0 if self.split or self.pictures < ENOUGH else HELD_OUT


def survey(config: DataConfig, source: Source, cache: Path) -> Survey:
    """Look at every picture once.

    Args:
        config: which pictures are meant.
        source: of them.
        cache: folder of what is kept.

    Raises:
        StorageError: the cache cannot be written.
    """
    captions, sides, digest = set[str](), list[int](), hashlib.sha256()
    for row, found in zip(source.rows, examined(source, cache)):
        texts = captions_of(row, source.uncaptioned)
        if isinstance(texts, str) or isinstance(found, str):
            continue
        captions.update(text for text in texts if text.strip())
        sides.append(min(found[1:]))
        digest.update(found[0].encode())
    return Survey(
        pictures=len(sides),
        side=int(median(sides)) if sides else 0,
        captions=len(captions),
        strange=share_of_strange_words(sorted(captions)),
        split=_has_split(config),
        digest=digest.hexdigest()[:16],
    )


def share_of_strange_words(captions: Sequence[str]) -> float:
    """Return the share of the words in captions that the embedded text encoder reads in pieces, as of other languages.

    Without a space between words, as in Japanese, a sentence is a word. Numbers count for nothing.
    """
    every = max(1, len(captions) // ASKED)
    found = {word for text in captions[::every] for word in re.findall(r"[^\W\d_]+", text.lower())}
    words = sorted(word for word in found if len(word) >= LETTERS or not word.isascii())[:ASKED]
    if not words:
        return 0.0
    tokenizer = Tokenizer.from_folder(embedded_model() / "tokenizer")
    return sum(count > 3 for count in tokenizer(words).counts) / len(words)  # with one token at each end


def _has_split(config: DataConfig) -> bool:
    try:
        open_source(config, "validation")
    except MissingSplitError:
        return False
    return True
