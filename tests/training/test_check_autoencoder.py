"""`latentdiff train --check` of an autoencoder: what it finds, what it refuses, and that it writes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentdiff.training.check import autoencoder as check_autoencoder
from latentdiff.training.check import table as check_parts
from latentdiff.training.check.autoencoder import examine_autoencoder
from latentdiff.training.check.table import Row
from latentdiff.training.config import AutoencoderTraining, load_config
from latentdiff.training.loop import resources

from latentdiff import devices
from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, StorageError
from latentdiff.models.lpips import Lpips
from tests.training.test_check import everything_in
from tests.training.test_lpips import network, weights  # noqa: F401  (fixtures)
from tests.training.test_stages import pictures, recipe


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny recipe over pictures with both other splits; most of the self-test is left out."""
    monkeypatch.setattr(check_autoencoder, "OVERFIT_STEPS", 2)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for split, count in (("train", 6), ("validation", 3), ("test", 2)):
        pictures(folder / split, count)
    return recipe(tmp_path, "autoencoder")


def found(file: str, *overrides: str) -> dict[str, Row]:
    config = load_config(file, list(overrides))
    assert isinstance(config, AutoencoderTraining)
    return {row.name: row for row in examine_autoencoder(config)}


def test_a_sound_run_is_found_sound_and_nothing_is_written(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_autoencoder, "OVERFIT_STEPS", 100)
    before = everything_in(tmp_path)
    assert main(["train", file, "--check", "--set", "loss.kl=1e-6"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.endswith(" ok") for line in lines) and last == "all as expected"
    examined = ["config", "run folder", "pictures", "skipped", "held-out pictures", "evaluation"]
    needed = ["parameters", "memory", "disk"]
    terms = [f"term {name}" for name in ("l1", "gradient", "ssim", "kl")]
    tried = ["gradient norm", "step", "FLOPs of a step", "overfits 8"]
    assert [line[:18].strip() for line in lines] == [*examined, *needed, *terms, *tried]
    assert "6 with 6 captions" in lines[2] and "5 looked at" in lines[4]
    assert "in 100 steps of the network" in lines[-1]
    assert everything_in(tmp_path) == before


def test_every_term_is_looked_at_and_a_reduced_network_stands_in(
    file: str,
    weights: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(check_parts.OVERFIT_FLOPS, device, 0.0)
    loss = ["l2=1", "lpips=1", f"lpips_weights={weights}", "adversarial=0.5", "adversarial_start=900", "r1=1"]
    rows = found(file, *(f"loss.{one}" for one in loss), "data.size=48", "run.gradient_checkpointing=true")
    terms = ("l1", "l2", "gradient", "ssim", "kl", "lpips", "adversarial", "discriminator", "r1")
    assert [name for name in rows if name.startswith("term ")] == [f"term {name}" for name in terms]
    assert {name for name, row in rows.items() if not row.fine} <= {"overfits 8"}
    assert rows["overfits 8"].value.endswith("of a reduced network")


def test_what_is_odd_is_pointed_at(
    file: str,
    tmp_path: Path,
    weights: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cli_train(file, ["run.steps=1"], False, None)
    shutil.rmtree(tmp_path / "pictures/validation")
    shutil.rmtree(tmp_path / "pictures/test")
    monkeypatch.setattr(Lpips, "forward", torch.no_grad()(Lpips.forward))
    rows = found(file, "loss.lpips=1", f"loss.lpips_weights={weights}", "run.batch_size=8")
    odd = {name for name, row in rows.items() if not row.fine}
    assert odd == {"run folder", "pictures", "held-out pictures", "term lpips", "overfits 8"}
    assert rows["held-out pictures"].value == "none, so that 6 of those trained on are taken"
    assert rows["term lpips"].value.endswith("gradient norm 0")


def test_what_would_stop_the_run_is_an_error(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        monkeypatch.context() as changed,
        pytest.raises(InputError, match=r"and there are 2.0 MiB; train a smaller mod"),
    ):
        changed.setattr(devices, "machine_memory", lambda: 2**21)
        found(file)
    with (
        monkeypatch.context() as changed,
        pytest.raises(StorageError, match=r"3 checkpoints of .* has 0.0 MiB free"),
    ):
        changed.setattr(resources.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
        found(file)
    with monkeypatch.context() as changed, pytest.raises(InputError, match=r"first gradients are \[nan, nan"):
        changed.setattr(check_autoencoder, "accumulate_gradients", poisoned)
        found(file)
    with pytest.raises(InputError, match=r"needs run.accumulation 1"):
        found(file, "loss.adversarial=0.5", "run.accumulation=2")
    assert not (tmp_path / "autoencoder").exists()


def poisoned(network: Any, *rest: Any) -> tuple[dict[str, Any], dict[str, float]]:  # noqa: F811
    """Leave gradients that are not finite."""
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    return {}, {}
