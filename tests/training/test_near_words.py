"""Captions of words that are near a name: which, of which drawings, and which words never."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from latentdiff.training.datasets import near_words
from latentdiff.training.datasets.held_out_words import WORDS
from latentdiff.training.datasets.near_words import NEAR, add_near_words, left_out, near_captions, sentences

from latentdiff.checkpoints import embedded_model, load_text_encoder
from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.evaluate.compose.words import STYLE_PHRASES
from latentdiff.models.bert import BertModel
from latentdiff.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def embedded() -> tuple[BertModel, Tokenizer]:
    encoder, tokenizer = load_text_encoder(embedded_model())
    assert isinstance(encoder, BertModel)
    return encoder, tokenizer


def row(thing: str, style: str, **more: Any) -> dict[str, Any]:
    captions = [f"{thing}, {STYLE_PHRASES[style]}", thing]
    return {"thing": thing, "style": style, "captions": captions, "variant": "", "group": "animals-nature", **more}


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    train = [
        *(row("a dog", style) for style in STYLE_PHRASES),
        row("a horse", "noto"),
        row("a canine tooth", "noto", variant="dark skin tone"),
        row("a dog", "noto", variant="light skin tone"),
        row("germany", "noto", group="flags"),
        {**row("a dog", "noto"), "truth": {}},
    ]
    for split, rows in {"train": train, "validation": [row("a ship", "noto")], "test": []}.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return tmp_path


def rows_of(out: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]


def test_words_become_captions_of_the_nearest_name(drawings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = ["canine", "##ine", "hound", "hounds", "puppy", "bulldog", "ship", "freighter", "pony", "mare", "of"]
    monkeypatch.setattr(Tokenizer, "vocabulary", lambda self: [*vocabulary, "german", "parliament"])
    before = rows_of(drawings)
    assert add_near_words(drawings) == 4  # "canine" and "ship" are read already
    after = rows_of(drawings)
    added = [new["captions"][len(old["captions"]) :] for old, new in zip(before, after)]
    assert [{**new, "captions": new["captions"][: len(old["captions"])]} for old, new in zip(before, after)] == before
    assert added[0] == ["puppy", "a puppy, noto style", "bulldog", "a bulldog, noto style"]
    assert added[1] == ["puppy", "a puppy, classic noto style", "bulldog", "a bulldog, classic noto style"]
    assert added[7] == ["mare", "a mare, noto style"]
    assert added[8:] == [[]] * 4  # skin tones, flags and scenes
    assert rows_of(drawings, "validation")[0]["captions"][2:] == ["freighter", "a freighter, noto style"]
    assert not left_out() & {word for captions in added for text in captions for word in text.split()}


def test_the_nearest_words_are_captions() -> None:
    words = [f"word{number}" for number in range(near_words.MOST + 3)]
    assert near_captions(words, "noto")[::2] == words[: near_words.MOST]
    assert near_captions(["pup"], "noto-v1") == ["pup", "a pup, classic noto style"]
    assert near_captions([], "noto") == []


def test_words_that_are_asked_for_have_a_name_among_the_nearest(embedded: tuple[BertModel, Tokenizer]) -> None:
    """What the captions rest on: the text encoder itself knows what most of the held-out words mean."""
    names = sorted({f"a {name}" for wanted in WORDS.values() for name in wanted})
    near = (sentences([*WORDS], *embedded) @ sentences(names, *embedded).T).topk(5)
    hits = [
        any(names[place].removeprefix("a ") in wanted for place in places)
        for wanted, places in zip(WORDS.values(), near.indices.tolist())
    ]
    assert sum(hits) >= 27 and (near.values[:, 0] > NEAR).sum() >= 20


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"cannot read file .*none"):
        add_near_words(tmp_path / "none")
    assert main(["data", "digits", str(tmp_path), "--near-words"]) == 2
    assert "--near-words are of the names of emoji, got digits; leave it out" in capsys.readouterr().err
