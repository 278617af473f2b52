"""Latents and text states of captioned pictures: only what changed is computed again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from latentdiff.training.config import DataConfig
from latentdiff.training.data import latents
from latentdiff.training.data.dataset import load_images
from latentdiff.training.data.latents import LatentSet, cached_latents
from PIL import Image

from latentdiff.checkpoints import Encoders
from latentdiff.diffusion import NoiseSchedule
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig


def components(hidden_size: int = 4) -> Encoders:
    encoder = LabelEncoder(LabelConfig(labels=("x", "y", "z"), hidden_size=hidden_size))
    return Encoders(autoencoder=PixelSpace(PixelSpaceConfig()), text_encoder=encoder, schedule=NoiseSchedule())


def write_set(folder: Path, captions: Sequence[str]) -> DataConfig:
    folder.mkdir(exist_ok=True)
    rows = [f'{{"file_name": "{n}.png", "text": "{caption}"}}' for n, caption in enumerate(captions)]
    for n in range(len(captions)):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return DataConfig(folder=str(folder), size=8, variants=["plain", "flip"])


def test_changed_pictures_captions_and_encoders_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = write_set(tmp_path / "set", "xyz"), []
    for name in ("_encode_pictures", "_packed_states"):
        before = getattr(latents, name)
        monkeypatch.setattr(
            latents, name, lambda *a, name=name, before=before: seen.append((name, len(a[-2]))) or before(*a)
        )

    def run(seed: int = 0, hidden_size: int = 4, **values: object) -> LatentSet:
        seen.clear()
        chosen = config.model_copy(update=values)
        return cached_latents(load_images(chosen), chosen, seed, components(hidden_size), tmp_path / "cache")

    data = run()
    assert seen == [("_encode_pictures", 6), ("_packed_states", 4)]
    assert torch.equal(data.latents[0].flip(-1), data.latents[1])
    assert torch.equal(data.texts.take(range(4))[0][:, 0], torch.cat([torch.zeros(1, 4), torch.eye(3, 4)]))
    run(seed=1)
    assert seen == []
    Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / "1.png")
    assert run().latents[2][0].float().min() == 1.0
    assert seen == [("_encode_pictures", 2)]
    run(background="black")
    assert seen == [("_encode_pictures", 6)]
    run(hidden_size=5)
    assert seen == [("_packed_states", 4)]
    write_set(tmp_path / "set", "xyy")
    run()
    assert seen == []


def test_samples_of_a_picture_keep_their_sizes(tmp_path: Path) -> None:
    config = write_set(tmp_path / "set", "xy")
    data = cached_latents(load_images(config), config, 0, components(), tmp_path / "cache")
    assert [sample.condition for sample in data.samples] == [(8, 8, 0, 0, 8, 8)] * 2
    assert replace(data.samples[0], size=(32, 8)).condition == (8, 32, 0, 12, 8, 8)


def test_pictures_without_captions_have_the_empty_one(tmp_path: Path) -> None:
    for n in range(2):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n}.png")
    config = DataConfig(folder=str(tmp_path), size=8)
    data = cached_latents(load_images(config), config, 0, components(), tmp_path / "cache")
    assert data.captions == [""]
    assert data.choices == [[[0]], [[0]]]
