"""The autoencoder stage's data: the same images from memory and decoded ahead, whole batches and shares of them."""

from pathlib import Path

import pytest
import torch

from training import dataset
from training.autoencoder import image_batches
from training.config import AutoencoderTraining

SAMPLE = Path(__file__).parents[2] / "assets" / "sample"


def test_images_do_not_depend_on_where_they_are_kept_or_on_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"data": {"folder": str(SAMPLE), "size": 16}, "run": {"out": str(tmp_path), "steps": 12, "batch_size": 6}}
    config = AutoencoderTraining.model_validate({"stage": "autoencoder", "model": {}, **values})
    held = list(image_batches(dataset.open_images(config.data, 6, tmp_path), config, 2))
    assert [images.shape for images in held] == [(6, 3, 16, 16)] * 10
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 0)
    lazy = dataset.open_images(config.data, 6, tmp_path)
    assert isinstance(lazy.images, dataset.LazyImages)
    for images, again in zip(held, image_batches(lazy, config, 2), strict=True):
        assert torch.equal(images, again)
    shares = list(image_batches(lazy, config, 5, [slice(0, 2), slice(2, 6)]))
    assert torch.equal(torch.cat(shares), torch.cat(held[3:]))
