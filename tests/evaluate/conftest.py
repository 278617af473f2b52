"""What tests of evaluation share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentdiff.checkpoints import embedded_model, load_text_encoder, save_model
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.models.image_text import ImageTextConfig, ImageTextModel


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-text model with random weights, beside the embedded text encoder."""
    encoder, tokenizer = load_text_encoder(embedded_model())
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
