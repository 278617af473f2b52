"""Precision, activation memory, the moving average and the launch files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from latentdiff.training.config import RunConfig
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.loop.ema import Ema
from latentdiff.training.loop.run import mixed_precision
from torch.nn import functional as F

from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.training import train_diffusion as diffusion
from tests.training.test_stages import check_interrupted, pictures, recipe, weights_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let accelerate, which knows one precision a process, forget the one of this test and of those before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_average_and_optimizer_stay_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None, precision: str
) -> None:
    pictures(tmp_path / "pictures", 6)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    halves = []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: halves.append((found := convolve(*a, **k)).dtype) or found)
    if precision == "fp16":
        monkeypatch.setattr(diffusion, "start_accelerator", scaling_on_the_cpu)
    file = recipe(tmp_path, "diffusion", run__precision=precision, run__steps=8)
    cli_train(file, ["run.ema_decay=0.5"], False, None)
    assert {"bf16": torch.bfloat16, "fp16": torch.float16}[precision] in halves
    checkpoint = load_latest(tmp_path / "diffusion")
    assert checkpoint is not None
    for part, tensors in checkpoint.tensors.items():
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, part
    assert any(tensor.any() for name, tensor in checkpoint.tensors["optimizer"].items() if "exp_avg" in name)
    if precision == "fp16":  # steps that overflow lower the scale and count as skipped, the others train
        assert checkpoint.state["scaler"]["scale"] == 2.0**24 / 2 ** checkpoint.state["skipped"]
        assert 0 < checkpoint.state["skipped"] < 8 and checkpoint.state["bad_steps"] == 0
        cli_train(file, ["run.ema_decay=0.5", "run.steps=9"], True, None)


def scaling_on_the_cpu(run: RunConfig) -> Any:
    """Do on a CPU what accelerate does on a GPU in fp16, from a scale with which the first steps overflow."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return accelerator


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    pictures(tmp_path / "pictures", 6)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    file = recipe(tmp_path, stage)
    calls = []
    silu = F.silu
    monkeypatch.setattr(F, "silu", lambda *a, **k: calls.append(torch.is_grad_enabled()) or silu(*a, **k))
    for name, value in (("kept", "false"), ("again", "true")):
        calls.append("start")
        cli_train(file, [f"run.gradient_checkpointing={value}"], False, str(tmp_path / name))
    split = calls.index("start", 1)
    kept, again = calls[:split].count(True), calls[split:].count(True)
    assert again > 1.5 * kept > 0
    ours, theirs = weights_of(tmp_path / "kept"), weights_of(tmp_path / "again")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_dropout_is_drawn_anew_each_step_and_alike_after_a_break(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 6)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    check_interrupted(recipe(tmp_path, "diffusion", model__dropout=0.3), tmp_path)
    cli_train(recipe(tmp_path, "diffusion"), [], False, str(tmp_path / "without"))
    unbroken, without = weights_of(tmp_path / "unbroken"), weights_of(tmp_path / "without")
    assert not all(torch.equal(tensor, without[name]) for name, tensor in unbroken.items())


def test_fp16_needs_a_gpu_and_is_not_for_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        mixed_precision(RunConfig(out="x", steps=1, batch_size=1, precision="fp16"))
    with pytest.raises(InputError, match="is for the diffusion stage"):
        cli_train(recipe(tmp_path, "autoencoder"), ["run.precision=fp16"], False, None)


def test_average_warms_up_and_leaves_live_weights_alone() -> None:
    layer: Any = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    ema = Ema(layer, 0.3)
    expected, decays = 1.0, [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]
    for number, decay in enumerate(decays):
        torch.nn.init.constant_(layer.weight, number)
        ema.update(layer)
        expected = decay * expected + (1 - decay) * number
        assert ema.weights["weight"].item() == pytest.approx(expected)
    live = layer.weight.detach().clone()
    with ema.swapped_into(layer):
        assert layer.weight.item() == pytest.approx(expected) and not layer.training
    assert torch.equal(layer.weight, live) and layer.training


@pytest.mark.parametrize("file", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda file: file.name)
def test_launch_files_are_what_accelerate_takes(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == {"one-gpu": 1, "eight-gpus": 8, "eight-gpus-fsdp": 8, "two-nodes": 16}[file.stem]
    assert yaml.safe_load(file.read_text())["mixed_precision"] == "no" and not config.use_cpu
