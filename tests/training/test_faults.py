"""What may befall a run: signals, a full disk, losses that are not finite, another config."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from latentdiff.training.loop import checkpointing
from latentdiff.training.loop.checkpointing import checkpoint_folders, load_latest
from latentdiff.training.loop.state import MAX_BAD_STEPS, StepGuard
from latentdiff.training.monitor.log import Log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, StorageError
from latentdiff.training import train_autoencoder as autoencoder
from tests.training.test_stages import pictures, recipe, weights_of


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A tiny autoencoder, four steps, saved each second one."""
    pictures(tmp_path / "pictures", 6)
    return recipe(tmp_path, "autoencoder")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_with_zero(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    cli_train(config, [], False, str(tmp_path / "unbroken"))
    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", lambda log, step, values: step == 0 and os.kill(os.getpid(), number))
        assert main(["train", config]) == 0
    assert [folder.name for folder in checkpoint_folders(tmp_path / "autoencoder")] == ["step-00000001"]
    assert not (tmp_path / "autoencoder/vae").exists()
    assert main(["train", config, "--resume"]) == 0
    unbroken, resumed = weights_of(tmp_path / "unbroken"), weights_of(tmp_path / "autoencoder")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())


def test_a_resumed_run_logs_each_step_once(config: str, tmp_path: Path) -> None:
    cli_train(config, ["run.log_every=1"], False, None)
    (tmp_path / "autoencoder/checkpoints/step-00000004/manifest.json").unlink()
    cli_train(config, ["run.log_every=1"], True, None)
    events = EventAccumulator(str(tmp_path / "autoencoder/logs")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    rates = [event.value for event in events.Scalars("learning_rate")]
    assert rates == pytest.approx([0.003 * share for share in (1 / 5, 2 / 5, 3 / 5, 4 / 5 * 0.5)])


def test_another_config_is_refused_with_the_difference_and_a_longer_run_is_not(config: str, tmp_path: Path) -> None:
    cli_train(config, [], False, None)
    with pytest.raises(InputError) as refused:
        cli_train(config, ["optimizer.learning_rate=0.1", "run.seed=3", "run.save_every=1"], True, None)
    message = str(refused.value)
    assert "step-00000004 is of another config: " in message and "run.seed was 0, is 3" in message
    assert "optimizer.learning_rate was 0.003, is 0.1" in message and "save_every" not in message
    cli_train(config, ["run.steps=6", "run.save_every=1", "run.log_every=1"], True, None)
    assert checkpoint_folders(tmp_path / "autoencoder")[0].name == "step-00000006"


def test_the_manifest_names_files_step_config_and_versions(config: str, tmp_path: Path) -> None:
    cli_train(config, [], False, None)
    cli_train(config, ["run.steps=5", "run.log_every=1"], False, str(tmp_path / "longer"))
    cli_train(config, ["run.seed=1"], False, str(tmp_path / "other"))
    manifests = [
        json.loads((checkpoint_folders(tmp_path / name)[0] / "manifest.json").read_text())
        for name in ("autoencoder", "longer", "other")
    ]
    first, longer, other = manifests
    assert first["step"] == 4 and first["versions"]["torch"] == torch.__version__
    model = checkpoint_folders(tmp_path / "autoencoder")[0] / "model.safetensors"
    assert first["files"]["model.safetensors"]["bytes"] == model.stat().st_size
    assert first["config_sha256"] == longer["config_sha256"] != other["config_sha256"]


@pytest.mark.parametrize("call", ["flush_to_disk", "_fingerprint"])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(checkpointing, call)

    def full(path: Path) -> Any:
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    monkeypatch.setattr(checkpointing, call, full)
    assert main(["train", config]) == 4
    assert [entry.name for entry in (tmp_path / "autoencoder/checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert main(["train", config, "--resume"]) == 0


def test_a_full_disk_is_named_wherever_it_is_met(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "vae.json")

    monkeypatch.setattr(autoencoder, "export", full)
    with pytest.raises(StorageError, match=r"no space left for vae.json; free some, then go on with --resume"):
        cli_train(config, [], False, None)


def losses_without_end(monkeypatch: pytest.MonkeyPatch, bad: list[int]) -> None:
    """Make the loss of some calls infinite."""
    real, calls = autoencoder.loss_terms, iter(range(1000))

    def terms(*arguments: Any) -> dict[str, torch.Tensor]:
        found = real(*arguments)
        return {name: term * float("inf") for name, term in found.items()} if next(calls) in bad else found

    monkeypatch.setattr(autoencoder, "loss_terms", terms)


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_without_end(monkeypatch, [2, 3])
    cli_train(config, ["run.save_every=1", "run.keep_checkpoints=9", "loss.adversarial=0.5"], False, None)
    after = {}
    for folder in checkpoint_folders(tmp_path / "autoencoder"):
        checkpoint = load_latest(tmp_path / "autoencoder")
        assert checkpoint is not None
        after[checkpoint.step] = checkpoint
        checkpointing._discard(folder)
    for part in ("model", "discriminator", "ema", "optimizer", "critic"):
        for name, tensor in after[4].tensors[part].items():
            assert torch.equal(tensor, after[2].tensors[part][name]) and torch.isfinite(tensor).all()
    assert not torch.equal(after[1].tensors["critic"]["0.step"], after[2].tensors["critic"]["0.step"])
    assert (after[4].state["bad_steps"], after[4].state["skipped"]) == (2, 2)


def test_a_run_that_stays_without_a_finite_loss_stops_even_when_it_is_resumed(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_without_end(monkeypatch, list(range(2, 1000)))
    cli_train(config, [], False, None)
    longer = ["run.steps=100", "run.save_every=8"]
    with pytest.raises(InputError, match=f"not finite {MAX_BAD_STEPS} steps in a row at step {MAX_BAD_STEPS + 1}"):
        cli_train(config, longer, True, None)
    checkpoint = load_latest(tmp_path / "autoencoder")
    assert checkpoint is not None and checkpoint.step == 16


def test_guard_counts_in_a_row_and_in_all() -> None:
    guard, fine, bad = StepGuard(), torch.tensor(1.0), torch.tensor(float("nan"))
    assert guard.allows(fine, fine, 0)
    assert not guard.allows(bad, fine, 1) and not guard.allows(fine, bad, 2)
    assert (guard.bad_steps, guard.skipped) == (2, 2)
    assert guard.allows(fine, fine, 3)
    assert (guard.bad_steps, guard.skipped) == (0, 2)
