"""Checkpoints: exact round trip, damaged ones passed over, nothing half-written, nothing non-finite."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from latentdiff.training.loop.checkpointing import checkpoint_problem, load_latest, save_checkpoint
from latentdiff.training.loop.state import load_optimizer, optimizer_tensors
from safetensors.torch import save_file

from latentdiff.errors import InputError


def save(run: Path, step: int, value: float, keep: int = 3) -> Path:
    return save_checkpoint(run, step, {"model": {"w": torch.full((4,), value)}}, {"ema_updates": step}, keep)


def test_newest_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2
    assert torch.equal(checkpoint.tensors["model"]["w"], torch.full((4,), 2.0))
    assert checkpoint.state["ema_updates"] == 2


def test_old_ones_go_and_empty_run_has_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    for step in range(4):
        save(tmp_path, step, 0.0, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 1.0)
    newest = save(tmp_path, 2, 2.0)
    file = newest / "model.safetensors"
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    assert "passed over" in capsys.readouterr().err


def test_unfinished_write_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    (tmp_path / "checkpoints" / ".tmp-step-00000002").mkdir()
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1


def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not finite"):
        save(tmp_path, 1, float("nan"))
    assert load_latest(tmp_path) is None


def test_optimizer_state_round_trip_is_exact() -> None:
    def trained(steps: int, optimizer: torch.optim.Optimizer, layer: torch.nn.Linear) -> torch.Tensor:
        for step in range(steps):
            optimizer.zero_grad()
            layer(torch.full((1, 3), 1.0 + step)).square().sum().backward()
            optimizer.step()
        return layer.weight.detach().clone()

    torch.manual_seed(0)
    first = torch.nn.Linear(3, 2)
    adam = torch.optim.AdamW(first.parameters(), lr=0.1)
    trained(3, adam, first)
    second = torch.nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    other = torch.optim.AdamW(second.parameters(), lr=0.1)
    load_optimizer(other, {name: tensor.clone() for name, tensor in optimizer_tensors(adam).items()})
    assert torch.equal(trained(2, adam, first), trained(2, other, second))


def test_every_byte_of_the_manifest_is_checked(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    manifest = save(tmp_path, 2, 2.0) / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert checkpoint_problem(manifest.parent)
    manifest.write_bytes(content)
    assert not checkpoint_problem(manifest.parent)
    renamed = manifest.parent.rename(tmp_path / "checkpoints/step-00000003")
    assert checkpoint_problem(renamed) == "is the checkpoint of step 2"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "a/b.json", "..\\secret.json", "pipe"])
def test_a_manifest_names_files_of_its_checkpoint_alone(tmp_path: Path, name: str) -> None:
    """Whoever wrote it could have hashed it too; and nothing waits at a pipe."""
    folder = save(tmp_path, 1, 1.0)
    save_file({"w": torch.ones(1)}, folder.parent / "secret.safetensors")
    if name == "pipe":
        os.mkfifo(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest["sha256"] = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    expected = "must be a regular file" if name == "pipe" else "which lies elsewhere"
    assert expected in checkpoint_problem(folder)


@pytest.mark.parametrize("content", ["null", "[]", "3", "[" * 100_000, "{" * 100_000, "x" * 2**21, ""])
def test_a_manifest_of_another_kind_is_passed_over(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1, 1.0)
    newest = save(tmp_path, 2, 1.0)
    (newest / "manifest.json").write_text(content)
    assert checkpoint_problem(newest).startswith("unreadable (")
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1


def test_a_pipe_in_the_place_of_a_manifest_is_not_waited_for(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, 1.0)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert "must be a regular file" in checkpoint_problem(folder)


def test_a_run_without_a_usable_checkpoint_does_not_start_over_in_silence(tmp_path: Path) -> None:
    (save(tmp_path, 1, 1.0) / "manifest.json").unlink()
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        load_latest(tmp_path)
