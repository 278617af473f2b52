"""A text encoder that is taught what captions of scenes say: it learns it, stays near what it was, and is saved."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from latentdiff.training.taught_text import Caption, by_kind, captions_of, read, teach, tokens_of

from latentdiff import Pipeline
from latentdiff.checkpoints import load_text_encoder
from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.models.bert import BertConfig, BertModel
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.training import taught_text
from tests.models.tiny import BERT, write_bert_vocabulary

NAMES = ("fox", "cat", "unfox")
LEFT, RIGHT = [0.05, 0.3, 0.45, 0.7], [0.55, 0.3, 0.95, 0.7]


def scene(left: str, right: str, color: str | None = None) -> dict[str, Any]:
    """Return the row of a scene of two things, "the red fox . the cat": left and right are the order alone."""
    said = f"the {color} {left}" if color else f"the {left}"
    things = [
        {"concept": name, "count": 1, "color": hue, "size": None, "boxes": [box]}
        for name, hue, box in ((left, color, LEFT), (right, None, RIGHT))
    ]
    return {"captions": [f"{said} {right}"], "truth": {"things": things}}


ROWS = [scene(*pair, color) for color in (None, "red") for pair in product(NAMES, repeat=2) if pair[0] != pair[1]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(write_bert_vocabulary(tmp_path / "tokenizer"))


@pytest.fixture
def encoder() -> BertModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(BertConfig.from_dict({**BERT, "vocab_size": 256, "use_attention_mask": True})).eval()


def test_tokens_of_names_are_found_with_what_is_said(tokenizer: Tokenizer) -> None:
    things = captions_of([scene("unfox", "cat", "red")])
    ids, mask, said = tokens_of([Caption("a tree"), *things], tokenizer)
    words = [tokenizer.vocabulary()[number] for number in ids[said.rows, said.places].tolist()]
    assert words == ["un", "##fox", "cat"] and said.rows.tolist() == [1, 1, 1]
    assert torch.allclose(said.center, torch.tensor([[-0.5, 0.0], [-0.5, 0.0], [0.5, 0.0]]), atol=1e-6)
    assert said.several.all() and (said.size == 0).all() and (said.count == 0).all()
    assert said.color.tolist() == [taught_text.COLOR_OF["red"]] * 2 + [0]
    assert ids.shape == mask.shape == (2, tokenizer.model_max_length)


def test_it_learns_what_captions_say_and_stays_near(
    encoder: BertModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taught_text, "LEARNING_RATE", 3e-3)
    monkeypatch.setattr(taught_text, "FASTER", 3)
    captions, plain = captions_of(ROWS), [Caption("a fox"), Caption("the cat")]
    ids, mask, _ = tokens_of(plain, tokenizer)
    with torch.no_grad():
        before = encoder(ids, mask).last_hidden_state
    table = encoder.embeddings.word_embeddings.weight.clone()
    said = list[str]()
    figures = read(
        encoder, tokenizer, teach(encoder, tokenizer, by_kind([*captions, *plain]), 120, said.append), captions
    )
    assert figures["left or right"] > 0.95 and figures["color"] > 0.95 and len(said) == taught_text.REPORTS
    with torch.no_grad():
        moved = (encoder(ids, mask).last_hidden_state - before).square().mean() / before.square().mean()
    assert 0 < moved < 0.1
    assert torch.equal(encoder.embeddings.word_embeddings.weight, table)
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_command_saves_the_model_with_the_taught_encoder(
    built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data", ROWS)
    call = ["teach", str(built_model), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "taught")]
    assert main([*call, "--iterations", "2"]) == 0
    assert "saved" in (said := capsys.readouterr().out) and "left or right" in said
    old, new = (load_text_encoder(folder)[0].state_dict() for folder in (built_model, tmp_path / "taught"))
    changed = {name for name in old if not torch.equal(old[name].half(), new[name].half())}
    assert changed and not any("embeddings.weight" in name for name in changed)
    unets = [
        Pipeline.from_pretrained(folder, device="cpu").unet.state_dict()
        for folder in (built_model, tmp_path / "taught")
    ]
    assert all(torch.equal(unets[0][name].half(), unets[1][name].half()) for name in unets[0])


def test_bad_input(built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["teach", str(built_model), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "taught")]
    expected = {
        "cannot read file": lambda: None,
        "is damaged": lambda: write(tmp_path / "data", ["{"]),
        "has rows without captions": lambda: write(tmp_path / "data", [{"text": "a fox"}]),
        "no caption is of a scene with several things": lambda: write(tmp_path / "data", [{"captions": ["a fox"]}]),
    }
    for message, prepare in expected.items():
        prepare()
        assert main(call) == 2
        assert message in (said := capsys.readouterr().err) and said.count("\n") == 1, said
        assert not (tmp_path / "taught").exists()
    assert main([*call, "--iterations", "0"]) == 2
    with pytest.raises(InputError):
        by_kind([Caption("a fox")])


def write(data: Path, rows: list[Any]) -> None:
    for split in ("train", "validation"):
        (data / split).mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (data / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
