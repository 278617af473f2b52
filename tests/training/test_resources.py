"""What a run will take: the estimate is what it then takes, and too little of it is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentdiff.training.loop import resources
from latentdiff.training.loop.checkpointing import checkpoint_folders
from latentdiff.training.loop.resources import Disk, Memory

from latentdiff import devices
from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.training import train_autoencoder as autoencoder
from latentdiff.training import train_diffusion as diffusion
from tests.training.test_stages import pictures, recipe


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what runs estimate."""
    found: list[Any] = []
    for name in ("estimate_memory", "estimate_disk"):
        real = getattr(resources, name)
        monkeypatch.setattr(resources, name, lambda *a, real=real: found.append(real(*a)) or found[-1])
    return found


def tensor_bytes(folder: Path, *components: str) -> int:
    from safetensors.torch import load_file

    tensors = [item for part in components for item in load_file(folder / f"{part}.safetensors").items()]
    return sum(tensor.nbytes for name, tensor in tensors if not name.endswith(".step"))


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_a_checkpoint_is_as_large_as_foretold(tmp_path: Path, estimates: list[Any], kind: str) -> None:
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path, "autoencoder", optimizer__kind=kind)
    cli_train(file, ["loss.adversarial=0.5"], False, None)
    memory, disk = estimates
    assert isinstance(memory, Memory) and isinstance(disk, Disk)
    newest = checkpoint_folders(tmp_path / "autoencoder")[0]
    assert memory.optimizer == tensor_bytes(newest, "optimizer", "critic")
    assert memory.gradients == 4 * memory.trained == 4 * memory.parameters == memory.weights
    assert memory.average == tensor_bytes(newest, "ema")
    size = sum(entry.stat().st_size for entry in newest.iterdir())
    assert disk.checkpoint < size < 1.2 * disk.checkpoint and disk.count == 3
    cli_train(file, ["loss.adversarial=0.5", "run.steps=5"], True, None)
    assert (estimates[2].needed, estimates[3].checkpoint, estimates[3].count) == (memory.needed, disk.checkpoint, 1)


@pytest.mark.parametrize(("stage", "memory"), [("autoencoder", 2), ("diffusion", 12)])
def test_too_little_memory_or_disk_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, memory: int
) -> None:
    pictures(tmp_path / "pictures", 4)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    command = ["train", recipe(tmp_path, stage), "--out", str(tmp_path / "run")]
    for module in (autoencoder, diffusion):
        monkeypatch.setattr(module, "Log", lambda *_: pytest.fail("training was begun"))
    capsys.readouterr()
    with monkeypatch.context() as changed:
        changed.setattr(torch.cuda, "is_available", lambda: False)
        changed.setattr(devices, "machine_memory", lambda: memory * 2**20)
        assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("latentdiff: training needs ") and " weights + " in error
    assert f"and there are {memory}.0 MiB; train a smaller model, with another optimizer.kind, or a lora" in error
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**18))
    assert main(command) == 4
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("latentdiff: 3 checkpoints of ") and "has 0.2 MiB free; free some, or lower" in error
    assert not checkpoint_folders(tmp_path / "run")
