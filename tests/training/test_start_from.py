"""Training that goes on from a Stable Diffusion checkpoint, which says what it predicts: noise, or velocity."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from accelerate import Accelerator
from latentdiff.training.config import load_config
from latentdiff.training.data.batches import Batch
from latentdiff.training.monitor.reconstructions import fold_statistics
from latentdiff.training.monitor.validation import held_out_errors
from latentdiff.training.setup import load_components, prepare_data
from PIL import Image
from safetensors.torch import save_file

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_pipeline, single_file
from latentdiff.commands.train import train as cli_train
from latentdiff.images import to_tensor
from tests.checkpoints.test_single_file import components_of, tensors_of, tiny
from tests.training.test_stages import pictures, weights_of

FAMILY, SIZE = "Stable Diffusion 1.x", 32


def small() -> dict[str, Any]:
    """The configuration of the family with two levels and few channels."""
    shape = tiny(FAMILY)
    unet = shape["unet"]
    for levels in ("block_out_channels", "down_block_types", "up_block_types"):
        unet[levels] = [unet[levels][0], unet[levels][-1]]
    unet["layers_per_block"] = 1
    return shape


def write_checkpoint(place: Path, layout: str, prediction_type: str) -> Path:
    """Write a tiny model, its latents of the pictures scaled to what training asks for."""
    shape = small()
    components = components_of(shape)
    autoencoder: Any = components.autoencoder
    files = sorted((place / "pictures").glob("*.png"))
    images = to_tensor([Image.open(file).convert("RGB").resize((SIZE, SIZE)) for file in files])
    with torch.no_grad():
        latents = autoencoder.encode(images).mode()
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    fold_statistics(autoencoder, mean, std * autoencoder.config.scaling_factor)
    components = replace(components, schedule=replace(components.schedule, prediction_type=prediction_type))
    if layout == "folder":
        save_pipeline(components, place / "base", dtype=None)
        return place / "base"
    marks = {single_file.VELOCITY: torch.zeros(0)} if prediction_type == "v_prediction" else {}
    save_file(tensors_of(components, shape) | marks, place / "base.safetensors")
    return place / "base.safetensors"


@pytest.mark.long
@pytest.mark.parametrize("layout", ["folder", "single file"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_checkpoint_learns_what_it_predicts_and_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, prediction_type: str
) -> None:
    monkeypatch.setattr(single_file, "families", lambda: {FAMILY: small()})
    pictures(tmp_path / "pictures", 6)
    start = write_checkpoint(tmp_path, layout, prediction_type)
    run, broken = tmp_path / "run", tmp_path / "broken"
    tree: dict[str, Any] = {
        "stage": "diffusion",
        "data": {"folder": str(tmp_path / "pictures"), "size": SIZE},
        "run": {"out": str(run), "steps": 20, "batch_size": 6, "precision": "no", "save_every": 10, "log_every": 10},
        "start_from": str(start),
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 1},
        "prompts": ["a"],
    }
    file = tmp_path / "go-on.yaml"
    file.write_text(yaml.safe_dump(tree))
    cli_train(str(file), ["run.ema_decay=0.5"], False, None)
    shutil.copytree(run, broken)
    (broken / "checkpoints/step-00000020/manifest.json").unlink()
    cli_train(str(file), ["run.ema_decay=0.5"], True, str(broken))
    unbroken, resumed = weights_of(run), weights_of(broken)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())
    assert not (run / "samples/process.png").exists()  # which takes thousands of steps and is for pixels

    config: Any = load_config(file)
    before, after = load_components(config), load_pipeline(run / "model")
    assert before.schedule.prediction_type == after.schedule.prediction_type == prediction_type
    data = prepare_data(config, before, run)
    latents = data.latents.take(range(6))
    context, _ = data.texts.take([choice[0][0] for choice in data.choices])
    samples = Batch(latents, context, torch.zeros(len(latents), dtype=torch.bool))
    errors = [held_out_errors(one.unet, one, config, samples, Accelerator(cpu=True)).mean() for one in (before, after)]
    assert errors[1] < 0.9 * errors[0]

    peer = diffusers.StableDiffusionPipeline.from_pretrained(run / "model", torch_dtype=torch.float32)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "pt"}
    expected = peer("a", height=SIZE, width=SIZE, **options).images
    drawn = Pipeline(after)("a", sampler="ddim", **options).images
    assert (drawn - expected).abs().max() <= 2 / 255
