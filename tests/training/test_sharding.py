"""FSDP2: two processes that share out the weights train what one process trains, and each goes on from the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.loop.sharding import shard, whole

from latentdiff.checkpoints import load_pipeline
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.conftest import UNET
from tests.training.test_distributed import OVERRIDES, Run, assert_same_run, logged, train_as
from tests.training.test_stages import PARTS, pictures, recipe, weights_of
from tests.two_processes import free_port, run_two

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what accelerate makes of its launch file


def launch(file: str, *command: str) -> None:
    """Run a module in two processes as a user does, on a machine without a GPU."""
    options = ["--config_file", str(ROOT / "configs/accelerate" / file), "--num_processes", "2"]
    line = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0", "-m", *command]
    hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(line, env={**os.environ, **hidden}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


def broken(run: Path, copy: Path) -> str:
    """Copy a run and damage its last checkpoint, so that it goes on from the one before."""
    shutil.copytree(run, copy)
    (copy / "checkpoints/step-00000004/manifest.json").unlink()
    return str(copy)


def shard_as(rank: int, port: int, runs: list[Run]) -> None:
    """Be one of two processes that go through some runs, each with half of the weights."""
    torch.set_num_threads(1)  # as in the processes that accelerate launches
    train_as(rank, port, runs, FSDP)
    torch.manual_seed(0)
    shape = UNetConfig.from_dict({**UNET, "only_cross_attention": True})
    unet, same = UNet2DConditionModel(shape), UNet2DConditionModel(shape)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    same.load_state_dict(unet.state_dict())
    shard(unet, Accelerator())
    sample, timesteps, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 5, 16)
    for network in (unet, same):
        network(sample, timesteps, context).square().mean().backward()
    gathered = {
        name: whole(parameter.grad) for name, parameter in unet.named_parameters() if parameter.grad is not None
    }
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(gathered[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    held: Any = unet.parameters()
    share = sum(parameter.to_local().numel() for parameter in held) / sum(p.numel() for p in same.parameters())
    assert 0.49 < share < 0.51


@pytest.mark.long
def test_shared_out_weights_train_as_whole_ones_do_and_resume_as_them_and_from_them(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    pictures(tmp_path / "pictures/train", 10)
    pictures(tmp_path / "pictures/validation", 3)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    file, overrides = recipe(tmp_path, "diffusion", run__ema_decay=0.5), OVERRIDES["diffusion"]
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    cli_train(file, overrides, False, str(one))
    options = [word for override in overrides for word in ("--set", override)]
    launch("eight-gpus-fsdp.yaml", "latentdiff", "train", file, *options, "--out", str(two))
    cli_train(file, overrides, True, broken(two, tmp_path / "two-then-one"))
    saving = [*overrides, "run.accumulation=2", "run.gradient_checkpointing=true"]
    runs = [(file, overrides, True, broken(run, tmp_path / f"{run.name}-then-two")) for run in (one, two)]
    run_two(shard_as, free_port(), [*runs, (file, saving, False, str(parts))])
    assert_same_run(one, two)
    assert_same_run(one, parts)
    assert "held_out/loss" in logged(two)
    for other in ("two", "parts", "two-then-one", "one-then-two"):
        assert_same_checkpoint(one, tmp_path / other)
    unbroken, resumed = weights_of(two), weights_of(tmp_path / "two-then-two")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())
    exported, same = (load_pipeline(run / "model").unet for run in (one, two))
    assert exported is not None and same is not None
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Compare the last checkpoints of two runs, names, shapes and dtypes exactly."""
    ours, theirs = load_latest(one), load_latest(other)
    assert ours is not None and theirs is not None and ours.tensors.keys() == theirs.tensors.keys()
    for part, tensors in ours.tensors.items():
        assert tensors.keys() == theirs.tensors[part].keys()
        for name, tensor in tensors.items():
            same = theirs.tensors[part][name]
            torch.testing.assert_close(same, tensor, rtol=1e-3, atol=1e-4, msg=f"{part}/{name}")


@pytest.mark.parametrize(
    ("stage", "overrides", "version", "message"),
    [
        ("diffusion", [], "1", "asks for FSDP version 1; set fsdp_version: 2"),
        ("autoencoder", [], "2", "FSDP is for the diffusion stage, the autoencoder is small; launch it with MULTI_GPU"),
        ("diffusion", ["run.compile=true"], "2", "run.compile does not go together with FSDP"),
        ("diffusion", ["run.precision=fp16"], "2", "run.precision fp16 does not go together with FSDP"),
        ("lora", [], "2", "FSDP is for the U-Net, not for a LoRA, words or the text encoder"),
        ("diffusion", ["train_text_encoder=true"], "2", "FSDP is for the U-Net, not for a LoRA, words or the text"),
    ],
)
def test_what_is_not_shared_out_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, overrides: list[str], version: str, message: str
) -> None:
    file = recipe(tmp_path, "autoencoder" if stage == "autoencoder" else "diffusion")
    if stage == "lora":
        tree: Any = yaml.safe_load(Path(file).read_text())
        tree = {name: value for name, value in tree.items() if name not in PARTS}
        Path(file).write_text(yaml.safe_dump({**tree, "start_from": "embedded", "lora": {"rank": 4}}))
    for name, value in {**FSDP, "FSDP_VERSION": version}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_CPU)
    monkeypatch.setattr(
        "latentdiff.training.loop.distributed.mixed_precision", lambda run, device: "no"
    )  # of a machine with a GPU
    with pytest.raises(InputError, match=message):
        cli_train(file, overrides, False, None)
    assert not (tmp_path / "diffusion").exists() and not (tmp_path / "autoencoder").exists()
