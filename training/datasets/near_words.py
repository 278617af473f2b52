"""Words that mean about what the name of a drawing does, for its captions: "canine" for a dog, "freighter" for a ship.

The text encoder knows some 20,000 English words, most of which no caption of the emoji has, and a U-Net does not draw
what it has not read, near as its states may be to something that it has. So each of those words that is near enough to
a name becomes a caption of what the nearest name is of.

Try:
    latentdiff data emoji data/emoji128 --size 128 --near-words
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff.checkpoints import embedded_model, load_text_encoder
from latentdiff.evaluate.compose.words import STYLE_PHRASES, plural, with_article
from latentdiff.models.bert import BertModel
from latentdiff.models.image_text import mean_states
from latentdiff.models.tokenizer import Tokenizer

from .emoji import SPLITS
from .held_out_words import WORDS
from .rows import read_rows, write_rows

NEAR = 0.45  # cosine of a word and a name from which on it becomes a caption
MOST = 8  # of one name, its nearest
BATCH = 256  # words


def add_near_words(out: str | Path) -> int:
    """Add captions of near words to the drawings of a set that `training.datasets.emoji.build` made.

    Drawings of flags and of skin tones have none. Words of `held_out_words` are left out.

    Args:
        out: folder of the set.

    Returns:
        How many words were near enough to a name.

    Raises:
        InputError, StorageError: see `rows`.
    """
    rows = {split: read_rows(Path(out) / split) for split in SPLITS}
    plain = [row for own in rows.values() for row in own if _is_plain(row)]
    read = {word for own in rows.values() for row in own for text in row["captions"] for word in _words(text)}
    encoder, tokenizer = load_text_encoder(embedded_model())
    assert isinstance(encoder, BertModel)
    words = {word for word in tokenizer.vocabulary() if re.fullmatch("[a-z]{3,}", word)}
    names = sorted({row["thing"] for row in plain})
    found = near_words(names, sorted(words - read - left_out()), encoder, tokenizer)
    for row in plain:
        row["captions"] = [*row["captions"], *near_captions(found.get(row["thing"], []), row["style"])]
    for split, own in rows.items():
        write_rows(Path(out) / split, own)
    return sum(map(len, found.values()))


def near_words(
    names: Sequence[str], words: Sequence[str], encoder: BertModel, tokenizer: Tokenizer
) -> dict[str, list[str]]:
    """Return for each name the words of which it is the nearest, nearest first, where they are near enough.

    Source: Reimers and Gurevych 2019, arXiv 1908.10084, section 3 (the mean of token states, compared by cosine).
    """
    embedded = sentences(names, encoder, tokenizer)
    best, places = (sentences(words, encoder, tokenizer) @ embedded.T).max(dim=1)
    found = defaultdict[str, list[str]](list)
    for number in best.argsort(descending=True, stable=True).tolist():
        if best[number] >= NEAR:
            found[names[int(places[number])]].append(words[number])
    return dict(found)


def near_captions(words: Sequence[str], style: str) -> list[str]:
    """Return the captions of a drawing in a style, of the words that are near its name, nearest first."""
    return [caption for word in words[:MOST] for caption in (word, f"{with_article(word)}, {STYLE_PHRASES[style]}")]


def left_out() -> set[str]:
    """Return the words that no caption may have: those of `held_out_words`, one and several."""
    return {form for word in WORDS for form in (word, plural(word))}


@torch.no_grad()
def sentences(texts: Sequence[str], encoder: BertModel, tokenizer: Tokenizer) -> Tensor:
    """Return (N, D), of length 1, the mean of the states of the tokens of each text."""
    made = []
    for start in tqdm(range(0, len(texts), BATCH), desc="words", unit="batch", disable=len(texts) <= BATCH):
        made.append(F.normalize(mean_states(encoder, tokenizer, texts[start : start + BATCH]), dim=-1))
    return torch.cat(made)


def _is_plain(row: dict[str, Any]) -> bool:
    return "truth" not in row and not row["variant"] and row["group"] != "flags"


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
