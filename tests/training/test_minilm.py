"""The vocabulary of the embedded text encoder without tokens that no English prompt has."""

from __future__ import annotations

import json

import pytest
from latentdiff.training.datasets.minilm import in_english, only
from tokenizers import Tokenizer

from latentdiff.embedded import embedded_model

FOREIGN = ("[unused12]", "##の", "上", "नमस्ते", "к", "##ας", "٣")
PROMPTS = (
    "a red fox, 3d style",
    "three Cups of Café au lait left of a smørrebrød",
    "Łódź - “at night” 20°c, £5 & 50 €!",
    "an unbelievably antidisestablishmentarian [MASK] axolotl",
)


def test_english_prompts_are_the_same_tokens_in_fewer_rows() -> None:
    tree = json.loads((embedded_model() / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    tree = only(dict.fromkeys([*FOREIGN, *tree["model"]["vocab"]]), tree)
    kept = [token for token in tree["model"]["vocab"] if in_english(token)]
    whole, fewer = (Tokenizer.from_str(json.dumps(one)) for one in (tree, only(kept, tree)))
    for prompt in PROMPTS:
        before, after = whole.encode(prompt), fewer.encode(prompt)
        assert after.tokens == before.tokens and "[UNK]" not in after.tokens
        assert [kept[number] for number in after.ids] == after.tokens
    assert fewer.get_vocab_size() == len(kept) <= whole.get_vocab_size() - len(FOREIGN)


@pytest.mark.parametrize("token", FOREIGN)
def test_other_scripts_and_rows_without_meaning_are_left_out(token: str) -> None:
    assert not in_english(token)


@pytest.mark.parametrize("token", ["fox", "##ing", "[CLS]", "é", "##ß", "”", "€", "→", "½"])
def test_latin_letters_and_signs_stay(token: str) -> None:
    assert in_english(token)
