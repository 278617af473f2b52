"""The diffusion stage's data: buckets, sizes for conditioning, shares of a batch, and nothing decoded twice."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentdiff.training.config import AutoencoderTraining, DiffusionTraining, parse_config
from latentdiff.training.data import dataset, image_info
from latentdiff.training.data.augment import paint, plan_variants
from latentdiff.training.data.batches import Batch, draw_batch, latent_batches
from latentdiff.training.data.dataset import open_images
from latentdiff.training.data.latents import TextCache
from latentdiff.training.setup import load_components, prepare_data
from PIL import Image

from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.images import to_tensor

SIZES = [(30, 30), (34, 30), (60, 30), (64, 31), (30, 60), (31, 63), (33, 30)]


def tree(tmp_path: Path, **data: Any) -> dict[str, Any]:
    """Write pictures of several shapes and return a config of classes in pixel space over them."""
    folder = tmp_path / "pictures"
    folder.mkdir(exist_ok=True)
    rows = []
    for index, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": "ab"[index % 2]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    model |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 4, "layers_per_block": 1}
    return {
        "stage": "diffusion",
        "data": {"folder": str(folder), "size": 16, "buckets": True, **data},
        "run": {"out": str(tmp_path / "run"), "steps": 3, "batch_size": 2, "precision": "no"},
        "autoencoder": None,
        "text_encoder": "labels",
        "model": model | {"attention_head_dim": 2},
        "schedule": {"beta_schedule": "squaredcos_cap_v2"},
        "prompts": ["a"],
    }


def config_of(tree: dict[str, Any]) -> DiffusionTraining:
    config = parse_config(tree)
    assert isinstance(config, DiffusionTraining)
    return config


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.latents, batch.context, batch.dropped, *batch.added.values()]


def test_every_batch_is_of_one_bucket(tmp_path: Path) -> None:
    config = config_of(tree(tmp_path))
    data = prepare_data(config, load_components(config), tmp_path / "run")
    shapes = set()
    for step in range(12):
        batch = draw_batch(data, config, step)
        assert batch.latents.shape[:2] == (2, 3) and batch.context.shape[:2] == (2, 1) and batch.dropped.shape == (2,)
        shapes.add(tuple(batch.latents.shape[2:]))
    assert shapes == {(16, 16), (8, 24), (24, 8)}


class Pooled:
    """Texts of a U-Net that is told of sizes too."""

    def __init__(self, texts: TextCache) -> None:
        self.texts = texts

    def take(self, rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        context, _ = self.texts.take(rows)
        return context, {"text_embeds": context[:, 0]}


def test_sizes_tell_which_window_is_seen(tmp_path: Path) -> None:
    config = config_of(tree(tmp_path, crop="random", crops=3, buckets=False, variants=["plain", "flip"]))
    data = prepare_data(config, load_components(config), tmp_path / "run")
    data = replace(data, texts=Pooled(data.texts))
    images = open_images(config.data, 2, tmp_path / "run")
    variants = [variant for n in range(len(images)) for variant in plan_variants(images, n, config.data, 0)]
    seen = set()
    for step in range(30):
        batch = draw_batch(data, config, step)
        for latent, size in zip(batch.latents, batch.added["time_ids"].int().tolist()):
            named = [v for v in variants if list(v.condition(images)) == size]
            pictures = to_tensor(np.stack([paint(images, variant) for variant in named]))
            assert any(torch.allclose(latent, picture, atol=1e-3) for picture in pictures)
            seen.add((*size[:2], *size[2:4]))
    assert len(seen) > 2 * len(SIZES) - 2
    shares = [draw_batch(data, config, 4, slice(number, number + 1)) for number in range(2)]
    whole = draw_batch(data, config, 4).added["time_ids"]
    assert torch.equal(shares[0].joined(shares[1]).added["time_ids"], whole)


def test_batches_drawn_ahead_are_those_of_the_steps_share_by_share(tmp_path: Path) -> None:
    config = config_of(tree(tmp_path) | {"run": {"out": str(tmp_path), "steps": 9, "batch_size": 3}})
    data = prepare_data(config, load_components(config), tmp_path / "run")
    whole = [draw_batch(data, config, step) for step in range(4, 9)]
    for ahead, expected in zip(latent_batches(data, config, 4), whole, strict=True):
        assert all(torch.equal(*pair) for pair in zip(tensors(ahead), tensors(expected), strict=True))
    shares = list(latent_batches(data, config, 4, [slice(0, 1), slice(1, 3)]))
    for one, two, expected in zip(shares[::2], shares[1::2], whole, strict=True):
        assert all(torch.equal(*pair) for pair in zip(tensors(one.joined(two)), tensors(expected), strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_run_with_buckets_trains_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 2**30 if in_memory else 0)
    monkeypatch.setattr("latentdiff.training.monitor.export.show_process", lambda *arguments: None)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(tree(tmp_path)))
    cli_train(str(file), [], False, None)
    assert (tmp_path / "run" / "model" / "unet").is_dir()


def test_what_was_encoded_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 0)
    config = config_of(tree(tmp_path, variants=["plain", "flip"]))
    before = prepare_data(config, load_components(config), tmp_path / "run")
    components = load_components(config)
    monkeypatch.setattr(image_info, "decode_rgba", lambda *arguments: pytest.fail("a picture was decoded"))
    again = prepare_data(config, components, tmp_path / "run")
    for step in range(4):
        first, second = (tensors(draw_batch(data, config, step)) for data in (before, again))
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the variant pair needs squares"):
        config_of(tree(tmp_path, variants=["plain", "pair"]))
    values = {"stage": "autoencoder", "model": {}, **{key: tree(tmp_path)[key] for key in ("data", "run")}}
    with pytest.raises(InputError, match=r"trained on squares; data\.buckets is for stage diffusion"):
        parse_config(values)
    values["data"]["buckets"] = False
    assert isinstance(parse_config(values), AutoencoderTraining)
