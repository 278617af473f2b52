"""What tests of evaluation share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentdiff.checkpoints import load_text_encoder, save_model
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.models.image_text import ImageTextConfig, ImageTextModel
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


@pytest.fixture(autouse=True)
def small_text_encoder(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the image-text model beside the small text encoder; there is none that ships."""
    monkeypatch.setattr("latentdiff.evaluate.judge.embedded_model", lambda: text)
