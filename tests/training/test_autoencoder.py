"""The autoencoder stage's data: the same images from memory and decoded ahead, whole batches and shares of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from latentdiff.training.config import AutoencoderTraining
from latentdiff.training.data import dataset, pictures
from latentdiff.training.data.pictures import draw_views, image_batches, load_held_out, load_measured
from PIL import Image

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


def test_windows_are_drawn_for_each_step_and_sample(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 96)[None].repeat(16, axis=0).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}')
    data = {"folder": str(tmp_path), "size": 16, "crop": "random"}
    values = {"data": data, "run": {"out": str(tmp_path / "run"), "steps": 40, "batch_size": 2}}
    config = AutoencoderTraining.model_validate({"stage": "autoencoder", "model": {}, **values})
    opened = dataset.open_images(config.data, 2, tmp_path / "run")
    drawn = [draw_views(opened, config, (slice(None),), step) for step in range(40)]
    assert len({int(pictures[0, 8, :, 0].min()) for pictures in drawn}) > 15
    for step in (7, 30):
        assert np.array_equal(draw_views(opened, config, (slice(None),), step), drawn[step])
        assert np.array_equal(draw_views(opened, config, (slice(0, 1), slice(1, 2)), 2 * step + 1), drawn[step][1:])


def test_held_out_pictures_are_those_of_the_share(tmp_path: Path) -> None:
    values = {"folder": str(SAMPLE), "size": 16, "held_out": 0.25}
    run = {"out": str(tmp_path), "steps": 1, "batch_size": 6}
    config = AutoencoderTraining.model_validate({"stage": "autoencoder", "model": {}, "data": values, "run": run})
    data = dataset.open_images(config.data, 6, tmp_path)
    held_out = load_held_out(config, data)
    assert held_out.shape[1:] == (3, 16, 16) and len(held_out) + len(data) == len(dataset.load_images(config.data))
    trained = {image.tobytes() for image in data.images}
    chosen = dataset.open_held_out(config.data, tmp_path / "cache", 64)
    assert chosen is not None and not any(image.tobytes() in trained for image in chosen.images)
    without = config.model_copy(update={"data": config.data.model_copy(update={"held_out": 0.0})})
    assert len(load_held_out(without, data)) == 16


def test_latents_are_measured_of_pictures_from_the_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes follow the drawings in a set, so that its first pictures are not like the others."""
    values = {"folder": str(SAMPLE), "size": 16}
    run = {"out": str(tmp_path), "steps": 1, "batch_size": 6}
    config = AutoencoderTraining.model_validate({"stage": "autoencoder", "model": {}, "data": values, "run": run})
    data = dataset.open_images(config.data, 6, tmp_path)
    every = load_measured(config, data)
    assert len(every) == len(data)
    monkeypatch.setattr(pictures, "HELD_OUT", 5)
    monkeypatch.setattr(pictures, "MEASURED_PIXELS", 0)
    some = load_measured(config, data)
    assert 3 <= len(some) <= 5 and torch.equal(some[0], every[0])
    assert any(torch.equal(some[-1], image) for image in every[len(every) // 2 :])
