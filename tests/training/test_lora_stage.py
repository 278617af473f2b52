"""LoRA as a training run: the base stays, the file works here and is in diffusers' dialect, resume is bitwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latentdiff.training.config import load_config
from latentdiff.training.monitor.reconstructions import fold_statistics
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline
from latentdiff.checkpoints.inspect import describe_file
from latentdiff.checkpoints.saver import save_pipeline
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.images import to_tensor
from tests.training.test_stages import check_interrupted, pictures, recipe, weights_of


@pytest.fixture
def file(tmp_path: Path, built_model: Path) -> str:
    """A recipe over six tiny pictures that starts from the tiny model."""
    pictures(tmp_path / "pictures", 6)
    base(built_model, tmp_path / "diffusion/model", tmp_path / "pictures")
    return recipe(tmp_path, "lora", optimizer__learning_rate=0.01, optimizer__warmup_steps=1)


def base(model: Path, folder: Path, drawn: Path) -> Path:
    """Save the tiny model, its latents of some pictures scaled to what training asks for."""
    components = load_pipeline(model)
    autoencoder: Any = components.autoencoder
    images = to_tensor([Image.open(file).convert("RGB") for file in sorted(drawn.glob("*.png"))])
    with torch.no_grad():
        latents = autoencoder.encode(images).mode()
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    fold_statistics(autoencoder, mean, std)
    autoencoder.config = replace(autoencoder.config, scaling_factor=1.0)
    save_pipeline(components, folder, dtype=None)
    return folder


def test_a_run_ends_in_a_file_that_changes_pictures(file: str, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "diffusion/model").rglob("*.safetensors")}
    cli_train(file, [], False, None)
    assert all(path.read_bytes() == content for path, content in before.items())
    lora = tmp_path / "lora" / "lora.safetensors"
    described = describe_file(lora)
    assert (described["kind"], described["dialect"], described["ranks"]) == ("LoRA", "diffusers", [2])
    assert described["precision"] == "F16" and described["layers"].keys() == {"unet"}
    pipe = Pipeline.from_pretrained(tmp_path / "diffusion/model", device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    styled = pipe.with_loras({lora: 1.0})
    assert not torch.allclose(styled("red fox", **options).images, pipe("red fox", **options).images, atol=1e-3)
    assert not (tmp_path / "lora" / "model").exists()


def test_an_interrupted_run_ends_with_the_same_file(file: str, tmp_path: Path) -> None:
    check_interrupted(file, tmp_path)
    first, second = ((tmp_path / run / "lora.safetensors").read_bytes() for run in ("unbroken", "resumed"))
    assert first == second


def test_only_the_thin_layers_are_in_checkpoints(file: str, tmp_path: Path) -> None:
    cli_train(file, ["lora.layers=[attention]"], False, None)
    assert all("/attn" in name or "/proj_" in name for name in weights_of(tmp_path / "lora"))


def test_odd_configs_are_refused(file: str) -> None:
    with pytest.raises(InputError, match=r"train.kind lora does not go with run.compile, which is for a whole U-Net"):
        load_config(file, ["run.compile=true"])
    with pytest.raises(InputError, match=r"train.rank"):
        load_config(file, ["lora.rank=0"])
    with pytest.raises(InputError, match=r"unknown key 'train.rang'; did you mean 'rank'"):
        load_config(file, ["lora.rang=4"])
