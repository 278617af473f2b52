"""`latentdiff train --check`: what it finds, what it refuses, and that it leaves the run folder alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentdiff.training.check import diffusion as check_module
from latentdiff.training.check import table as check_parts
from latentdiff.training.check.diffusion import examine_diffusion
from latentdiff.training.check.table import Row
from latentdiff.training.config import DiffusionTraining, load_config
from latentdiff.training.data.batches import Batch
from latentdiff.training.loop import resources

from latentdiff import devices
from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, StorageError
from tests.training.test_diffusion import config_of
from tests.training.test_diffusion import tree as shapes
from tests.training.test_lora_stage import file as lora_recipe  # noqa: F401  (a fixture)
from tests.training.test_objective import LEARNED, recipe
from tests.training.test_stages import pictures
from tests.training.test_validation import with_validation


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out most of the self-test."""
    monkeypatch.setattr(check_module, "OVERFIT_STEPS", 2)
    monkeypatch.setattr(check_module, "SAMPLES", 40)


def found(file: str, *overrides: str) -> dict[str, Row]:
    config = load_config(file, list(overrides))
    assert isinstance(config, DiffusionTraining)
    return {row.name: row for row in examine_diffusion(config)}


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.long
def test_a_sound_run_is_found_sound_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_module, "OVERFIT_STEPS", 150)
    with_validation(tmp_path / "pictures", 3)
    file = recipe(tmp_path)
    before = everything_in(tmp_path)
    assert main(["train", file, "--check"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.endswith(" ok") for line in lines) and last == "all as expected"
    assert "6 with 6 captions" in lines[2] and "3 looked at" in lines[4]
    assert lines[-1].startswith("overfits 8") and "in 150 steps of the network" in lines[-1]
    assert everything_in(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_a_lora_is_looked_at_beside_its_model(
    lora_recipe: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(check_parts.OVERFIT_FLOPS, "cpu", 0.0)
    monkeypatch.setitem(check_parts.OVERFIT_FLOPS, "cuda", 0.0)
    before = everything_in(tmp_path)
    rows = found(lora_recipe)
    assert everything_in(tmp_path) == before
    assert rows["config"].value.startswith("diffusion: LoRA of rank 2, from ")
    assert rows["latent mean"].fine and rows["latent std"].fine and rows["gradient norm"].fine
    trained, total = (int(text.split()[place].replace(",", "")) for text, place in zip(rows["parameters"][1:3], (0, 1)))
    assert 0 < trained < total
    assert rows["overfits 8"].value.endswith("of a reduced network")


@pytest.mark.long
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "hybrid", "schedule": LEARNED},
        {"loss": "vlb", "timesteps": "importance", "text_encoder": "none", "channels": 1},
        {"self_conditioning": True, "schedule": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}},
    ],
    ids=["hybrid", "vlb", "self-conditioned"],
)
def test_every_objective_is_looked_at(tmp_path: Path, changes: dict[str, Any]) -> None:
    pictures(tmp_path / "pictures", 6)
    rows = found(recipe(tmp_path, **changes), "run.accumulation=2", "run.gradient_checkpointing=true")
    odd = {name for name, row in rows.items() if not row.fine}
    assert odd <= {"held-out pictures", "overfits 8"} and len(rows) == 20


@pytest.mark.usefixtures("quick")
def test_pictures_of_several_shapes_are_looked_at(tmp_path: Path) -> None:
    config = config_of(shapes(tmp_path))
    before = everything_in(tmp_path)
    rows = {row.name: row for row in examine_diffusion(config)}
    assert everything_in(tmp_path) == before
    assert rows["pictures"].value.startswith("7 with 7 captions") and len(rows) == 20


@pytest.mark.usefixtures("quick")
def test_what_is_odd_is_pointed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "pictures", 3)
    file = recipe(tmp_path)
    cli_train(file, ["run.steps=1"], False, None)
    before = everything_in(tmp_path / "run")
    draw_batch = check_module.draw_batch

    def keeping_all_captions(*arguments: Any) -> Batch:
        batch = draw_batch(*arguments)
        return replace(batch, dropped=torch.zeros_like(batch.dropped))

    monkeypatch.setattr(check_module, "draw_batch", keeping_all_captions)
    monkeypatch.setattr(check_module, "held_out_errors", lambda *_: torch.zeros(4, 8))  # as if shown the answers
    rows = found(file, "caption_dropout=0.5")
    assert everything_in(tmp_path / "run") == before
    odd = {name for name, row in rows.items() if not row.fine}
    errors = {name for name in rows if name.startswith("error")}
    assert odd == errors | {"run folder", "pictures", "held-out pictures", "null prompts", "overfits 8"}
    assert rows["run folder"].value.endswith("step-00000001, objective.caption_dropout was 0.1, is 0.5")
    assert rows["null prompts"].value.startswith("0.0%")


@pytest.mark.usefixtures("quick")
def test_what_would_stop_the_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path)
    memory, norms = (
        r"needs 4\.. MiB \(.*and there are 3.0 MiB; train a smaller model",
        r"gradients are \[nan, .*; lower optimizer",
    )
    for module, name, value, message in (
        (devices, "machine_memory", lambda: 3 * 2**20, memory),
        (check_module, "accumulate_gradients", poisoned, norms),
    ):
        with monkeypatch.context() as changed, pytest.raises(InputError, match=message):
            changed.setattr(torch.cuda, "is_available", lambda: False)
            changed.setattr(module, name, value)
            found(file)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"3 checkpoints of .* MiB need .* MiB, and .* has 0.0 MiB free"):
        found(file)
    capsys.readouterr()
    assert main(["train", file, "--check", "--set", "run.stepz=3"]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err == (
        f"latentdiff: {file}: unknown key 'run.stepz'; did you mean 'steps'?\n"
    )
    assert not (tmp_path / "run").exists()


def poisoned(network: Any, *rest: Any) -> None:
    """Leave gradients that are not finite."""
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
