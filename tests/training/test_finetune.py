"""Recipes that are chosen: for small and large models, few and many pictures; and one run from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from latentdiff.training.config import DiffusionTraining, LoraConfig, parse_config
from latentdiff.training.finetune import choose
from PIL import Image
from safetensors.torch import save_file

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline
from latentdiff.cli import main
from latentdiff.training import finetune as finetune_module
from tests.checkpoints.test_single_file import components_of, tensors_of, tiny
from tests.checkpoints.test_single_file import use_tiny as use_tiny
from tests.training.test_lora_stage import base
from tests.training.test_stages import pictures


@pytest.fixture
def own_precision() -> Iterator[None]:
    """Let a run choose its precision, which accelerate keeps for the time of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def chosen(model: Path, captions: list[str], rank: int | None) -> DiffusionTraining:
    config = parse_config(choose(load_pipeline(model), "pictures", captions, "out", str(model), rank))
    assert isinstance(config, DiffusionTraining)
    return config


def test_steps_follow_the_pictures(built_model: Path) -> None:
    few, many, more = (chosen(built_model, ["a"] * count, None).run for count in (8, 1000, 100_000))
    assert (few.steps, many.steps, more.steps) == (200, 1250, 4000)
    assert few.ema_decay == 0.99 and many.ema_decay == 0.999


def test_lora_and_large_models_are_trained_otherwise(built_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, thin = chosen(built_model, ["a"] * 9, None), chosen(built_model, ["a"] * 9, 4)
    assert whole.train.kind == "unet" and isinstance(thin.train, LoraConfig) and thin.train.rank == 4
    assert "convolution" in thin.train.layers
    assert thin.optimizer.learning_rate > whole.optimizer.learning_rate
    monkeypatch.setattr(finetune_module, "SMALL", 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    large = chosen(built_model, ["a"] * 9, 4)
    assert large.run.gradient_checkpointing and large.run.batch_size == large.run.accumulation
    assert isinstance(large.train, LoraConfig) and "convolution" not in large.train.layers
    assert large.optimizer.learning_rate < thin.optimizer.learning_rate


@pytest.mark.usefixtures("own_precision")
def test_one_command(
    built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the recipe that it runs, which is one that `latentdiff train` takes."""
    for file in pictures(tmp_path / "pictures", 6).glob("*.png"):
        Image.open(file).resize((32, 32)).save(file)
    model = base(built_model, tmp_path / "base", tmp_path / "pictures")
    monkeypatch.setattr(finetune_module, "STEPS", (2, 2))
    out = tmp_path / "run"
    call = ["finetune", str(tmp_path / "pictures"), "--model", str(model), "--out", str(out)]
    assert main([*call, "--lora", "2"]) == 0
    printed = capsys.readouterr().out.partition("saved ")[0]
    tree: Any = yaml.safe_load(printed)
    assert parse_config(tree).run.steps == 2 and tree["train"]["rank"] == 2
    pipe = Pipeline.from_pretrained(model, device="cpu").with_loras({out / "lora.safetensors": 1.0})
    assert pipe("a", num_inference_steps=2).images[0].size == (32, 32)
    assert main(call) == 2
    assert "add --resume" in capsys.readouterr().err
    lora = (out / "lora.safetensors").read_bytes()
    (out / "lora.safetensors").unlink()
    assert main([*call, "--resume"]) == 0
    assert len((out / "lora.safetensors").read_bytes()) == len(lora)
    capsys.readouterr()
    assert main(["finetune", str(tmp_path / "none"), "--out", str(tmp_path / "other")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.usefixtures("own_precision", "use_tiny")
@pytest.mark.parametrize(
    ("family", "task"), [("Stable Diffusion 1.x", "inpaint"), ("Stable Diffusion x4 upscaler", "upscale")]
)
def test_one_command_for_other_tasks(
    family: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single file of Stable Diffusion's layout learns to inpaint, an upscaler goes on with pictures of one's own."""
    for file in pictures(tmp_path / "pictures", 6).glob("*.png"):
        Image.open(file).resize((32, 32)).save(file)
    model = tmp_path / "sd.safetensors"
    shape = tiny(family)
    save_file(tensors_of(components_of(shape), shape), model)
    monkeypatch.setattr(finetune_module, "STEPS", (2, 2))
    out = tmp_path / "run"
    call = ["finetune", str(tmp_path / "pictures"), "--model", str(model), "--out", str(out)]
    assert main([*call, *(["--task", task] if task == "inpaint" else [])]) == 0
    printed, _, said = capsys.readouterr().out.partition("saved ")
    tree: Any = yaml.safe_load(printed)
    assert f"latentdiff {'upscale PICTURE' if task == 'upscale' else 'generate'} " in said
    assert tree["task"]["kind"] == task and parse_config(tree).run.steps == 2
    pipe = Pipeline.from_pretrained(out / "model", device="cpu")
    image, mask = Image.open(tmp_path / "pictures" / "0.png").convert("RGB"), Image.new("L", (32, 32))
    if task == "inpaint":
        mask.paste(255, (8, 8, 24, 24))
        drawn = pipe("a", image=image, mask=mask, num_inference_steps=2).images[0]
        kept, given = (picture.crop((0, 0, 32, 8)).tobytes() for picture in (drawn, image))
        assert pipe.unet.config.in_channels == 9 and kept == given
    else:
        drawn = pipe("a", image=image.resize((8, 8)), num_inference_steps=2).images[0]
        factor = pipe.autoencoder.config.downsample_factor
        assert pipe.components.upscales and drawn.size == (8 * factor, 8 * factor)


@pytest.mark.usefixtures("own_precision")
def test_a_task_is_that_of_the_model(built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = [
        "finetune",
        str(pictures(tmp_path / "pictures", 6)),
        "--model",
        str(built_model),
        "--out",
        str(tmp_path / "a"),
    ]
    assert main([*call, "--task", "upscale"]) == 2
    assert "task upscale must be what " in capsys.readouterr().err
    assert main([*call, "--task", "inpaint", "--lora", "2"]) == 2
    assert "a lora has no new input channels" in capsys.readouterr().err
    assert main([*call, "--task", "paint"]) == 2
    assert "TASK 'paint' is unknown" in capsys.readouterr().err
