"""What tests of evaluation share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentdiff.checkpoints import load_text_encoder, save_model
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.models.image_text import ImageTextConfig, ImageTextModel
from tests.models.tiny import noise_picture
from tests.training.test_stages import text_folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text encoder with random weights, in place of the embedded one."""
    return text_folder(tmp_path_factory.mktemp("text") / "emoji")


@pytest.fixture(scope="session")
def judge(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-text model with random weights, beside the small text encoder."""
    encoder, tokenizer = load_text_encoder(text)
    torch.manual_seed(0)
    config = ImageTextConfig(
        image_size=16,
        block_out_channels=(8, 16),
        text_dim=encoder.config.hidden_size,
        projection_dim=8,
        text_encoder=network_digest(encoder, tokenizer),
    )
    save_model(ImageTextModel(config), folder := tmp_path_factory.mktemp("judge") / "image_text", torch.float16)
    return folder


@pytest.fixture(scope="session")
def call(tmp_path_factory: pytest.TempPathFactory, built_model: Path, judge: Path) -> list[str]:
    """The command for the tiny model, with a random image-text model and eight captioned pictures."""
    place = tmp_path_factory.mktemp("evaluate")
    (place / "data").mkdir()
    rows = []
    for index, text in enumerate(("a fox", "a cat", "a fox", "a dog", "a house", "a tree", "a fox", "a fox")):
        noise_picture(32, 32, seed=index).save(place / f"data/{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": text}))
    (place / "data/metadata.jsonl").write_text("\n".join(rows))
    data = ["--data", str(place / "data"), "--split", "train", "--judge", str(judge)]
    return ["evaluate", str(built_model), *data, "--metrics", "clip", "--steps", "2", "--batch-size", "2", "--n", "6"]


@pytest.fixture(autouse=True)
def small_text_encoder(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the image-text model beside the small text encoder, not the one that ships."""
    monkeypatch.setattr("latentdiff.evaluate.judge.embedded_model", lambda: text)
