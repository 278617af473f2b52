"""The tokenizer against transformers' CLIPTokenizer and BertTokenizer: the same numbers for any prompt."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from transformers import BertTokenizer, CLIPTokenizer

from latentdiff.models.tokenizer import Tokenizer
from tests.models.tiny import write_bert_vocabulary, write_clip_vocabulary

WINDOW = 20
PROMPTS = [
    "",
    "the red fox",
    "The  RED\tfox\nin the\u00a0fog!",
    "don't re-draw it: 1234 cats, it's we'll",
    "café cafe\u0301 ÉTÉ Straße İstanbul",
    "中文 狐狸",
    "🦊 fox 👩‍🚀!!!",
    "<|endoftext|> fox <|startoftext|> [SEP] [MASK]",
    "un[CLS]fox !the! unfoxing",
    "\u200b\ufeffzero\x07width",
    " ",
]
LONG = "the red fox and the red cat in the red fog, " * 5


def clip(folder: Path) -> tuple[Tokenizer, Any]:
    write_clip_vocabulary(folder, window=WINDOW)
    return Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


def clip_padded_by_an_exclamation_mark(folder: Path) -> tuple[Tokenizer, Any]:
    write_clip_vocabulary(folder, window=WINDOW, pad_token="!")
    return Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


def bert(folder: Path) -> tuple[Tokenizer, Any]:
    write_bert_vocabulary(folder, window=WINDOW)
    return Tokenizer.from_folder(folder), BertTokenizer.from_pretrained(folder)


def cased_bert(folder: Path) -> tuple[Tokenizer, Any]:
    write_bert_vocabulary(folder, window=WINDOW, lower=False)
    return Tokenizer.from_folder(folder), BertTokenizer.from_pretrained(folder)


def saved(make: Any) -> Any:
    def make_saved(folder: Path) -> tuple[Tokenizer, Any]:
        reference = make(folder / "source")[1]
        reference.save_pretrained(folder / "saved")
        return Tokenizer.from_folder(folder / "saved"), reference

    make_saved.__name__ = f"saved_{make.__name__}"
    return make_saved


PLAIN = [clip, clip_padded_by_an_exclamation_mark, bert, cased_bert]
KINDS = [*PLAIN, *(saved(make) for make in PLAIN)]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_same_numbers(make: Any, tmp_path: Path) -> None:
    ours, reference = make(tmp_path)
    short = [prompt for prompt in PROMPTS if len(reference(prompt).input_ids) <= WINDOW]
    assert len(short) > 5
    expected = reference(short, padding="max_length", max_length=WINDOW, truncation=True)
    batch = ours(short)
    assert ours.model_max_length == reference.model_max_length
    assert batch.input_ids.tolist() == expected.input_ids
    assert batch.attention_mask.tolist() == expected.attention_mask
    assert batch.counts == [sum(mask) for mask in expected.attention_mask]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_same_numbers_in_windows(make: Any, tmp_path: Path) -> None:
    """Windows are full of whole words: a word, or a number, that does not fit begins the next window."""
    ours, reference = make(tmp_path)
    begin, end = reference("").input_ids
    for prompt in [*PROMPTS, LONG]:
        encoded = reference(prompt, add_special_tokens=False)
        digits = [reference.decode([number]).strip(" #").isdecimal() for number in encoded.input_ids]
        places = [None if digit else place for digit, place in zip(digits, encoded.word_ids())]
        words = [list(word) for _, word in groupby(zip(places, encoded.input_ids), itemgetter(0))]
        windows: list[list[int]] = [[]]
        for word in words:
            if len(windows[-1]) + len(word) > WINDOW - 2:
                windows.append([])
            windows[-1] += [number for _, number in word]
        expected = [[begin, *window, end, *[reference.pad_token_id] * (WINDOW - 2 - len(window))] for window in windows]
        assert ours([prompt]).input_ids[0].reshape(-1, WINDOW).tolist() == expected
