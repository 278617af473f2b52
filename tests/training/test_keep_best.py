"""Evaluations while training: the best is kept, patience ends a run, a resumed run ends as an unbroken one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from latentdiff.training.config import load_config
from latentdiff.training.config.evaluation import OF_AUTOENCODERS, OF_TASKS
from latentdiff.training.loop.best import BEFORE, BEST, Best, keep, restore, settle
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.monitor.log import Log
from torch.nn import functional as F

from latentdiff import Pipeline
from latentdiff.checkpoints import load_autoencoder
from latentdiff.commands.train import check as cli_check
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, LatentDiffError
from latentdiff.evaluate.features import FeatureNetwork
from latentdiff.evaluate.run import METRICS
from tests.training.test_stages import pictures, recipe, weights_of

Scalars = dict[int, dict[str, float]]
HELD_OUT = ["data.held_out=0.5", "run.batch_size=2", "evaluate.n=8"]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Scalars:
    """What is logged in this test, by step; empty it between two runs."""
    found: Scalars = {}
    write = Log.write

    def also(self: Log, step: int, scalars: dict[str, float]) -> None:
        found.setdefault(step, {}).update(scalars)
        write(self, step, scalars)

    monkeypatch.setattr(Log, "write", also)
    return found


@pytest.fixture(autouse=True)
def quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make mean colours of quarters the features of all pictures."""

    def find(choice: str, _: object) -> FeatureNetwork:
        return FeatureNetwork(choice, "0", "none", lambda images: F.adaptive_avg_pool2d(images, 2).flatten(1))

    monkeypatch.setattr("latentdiff.training.monitor.evaluation.find_features", find)


def diffusion(tmp_path: Path) -> str:
    """Return a diffusion config over some pictures and a trained autoencoder."""
    pictures(tmp_path / "pictures", 24)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    return recipe(tmp_path, "diffusion")


def best_of(run: Path) -> Mapping[str, Any]:
    return json.loads((run / BEST / "best.json").read_text())


def model_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the U-Net that was kept."""
    return Pipeline.from_pretrained(run / BEST).unet.state_dict()


@pytest.mark.long
def test_the_best_of_the_logged_values_is_kept_and_training_is_as_without(
    tmp_path: Path, logged: Scalars, capsys: pytest.CaptureFixture[str]
) -> None:
    file = diffusion(tmp_path)
    cli_train(file, HELD_OUT, False, str(tmp_path / "without"))
    logged.clear()
    asked = [*HELD_OUT, "evaluate.every=1", "evaluate.keep_best=kid", "evaluate.metrics=[kid, mmd]"]
    cli_train(file, asked, False, str(tmp_path / "with"))
    values = {step: scalars["evaluate/kid"] for step, scalars in logged.items() if "evaluate/kid" in scalars}
    assert sorted(values) == [1, 2, 3, 4]
    assert all("held_out/loss" in logged[step] and "evaluate/mmd" in logged[step] for step in values)
    best = best_of(tmp_path / "with")
    assert best == {"name": "kid", "step": min(values, key=lambda step: values[step]), "value": min(values.values())}
    ours, theirs = weights_of(tmp_path / "with"), weights_of(tmp_path / "without")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    out = capsys.readouterr().out
    assert f"best kid {best['value']:.6g} at step {best['step']}; saved {tmp_path / 'with/best'}" in out
    report = json.loads((tmp_path / "with/report/report.json").read_text())
    assert [figure["name"] for figure in report["figures"]] == ["kid", "mmd"]
    assert report["subject"]["model_hash"] == Pipeline.from_pretrained(tmp_path / "with/best").components.model_hash
    assert (tmp_path / "with/report/report.html").is_file()
    assert not list((tmp_path / "with").glob(".*evaluation*")) and not (tmp_path / "with" / BEFORE).exists()


@pytest.mark.long
@pytest.mark.parametrize(("task", "metric"), [("inpaint", "inpainting"), ("upscale", "upscaling")])
def test_models_of_a_task_are_measured_by_it(tmp_path: Path, logged: Scalars, task: str, metric: str) -> None:
    """Also when training turns a model of texts into one that inpaints."""
    file = Path(diffusion(tmp_path))
    file.write_text(f"{file.read_text()}\ntask: {task}\n" + ("max_noise_level: 20\n" if task == "upscale" else ""))
    asked = ["evaluate.every=2", f"evaluate.keep_best={metric}/psnr", f"evaluate.metrics=[{metric}, neighbours]"]
    cli_train(str(file), [*HELD_OUT, *asked, "evaluate.n=3", "evaluate.features=latents"], False, str(tmp_path / "run"))
    assert {f"evaluate/{metric}/psnr", "evaluate/neighbours"} <= logged[4].keys()
    assert best_of(tmp_path / "run")["name"] == f"{metric}/psnr"
    assert (tmp_path / f"run/report/{metric}.png").is_file()


def test_patience_ends_a_run_for_good_and_the_best_model_is_that_of_its_step(
    tmp_path: Path, logged: Scalars, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "pictures", 24)
    file = recipe(tmp_path, "autoencoder", run__steps=30, optimizer__learning_rate=1.0, run__ema_decay=0.0)
    asked = ["evaluate.every=2", "evaluate.keep_best=held_out_psnr", "evaluate.patience=2"]
    cli_train(file, [*HELD_OUT, *asked, "evaluate.metrics=[psnr]"], False, None)
    run = tmp_path / "autoencoder"
    values = {step: scalars["held_out_psnr"] for step, scalars in logged.items() if "held_out_psnr" in scalars}
    best, last = max(values, key=lambda step: values[step]), max(values)
    assert last == best + 4 < 30
    checkpoint = load_latest(run)
    assert checkpoint is not None and checkpoint.step == last
    assert best_of(run) == {"name": "held_out_psnr", "step": best, "value": values[best]}
    report = json.loads((run / "report/report.json").read_text())
    # As it was measured at that step, but for rounding where the latents' statistics were folded in.
    assert report["figures"][0]["estimate"]["value"] == pytest.approx(logged[best]["evaluate/psnr"], abs=0.01)
    assert load_autoencoder(run / BEST).config.scaling_factor == 1.0
    assert (run / "vae/config.json").is_file()
    logged.clear()
    cli_train(file, [*HELD_OUT, *asked, "evaluate.metrics=[psnr]"], True, None)
    assert not logged and f"at step {best}; saved" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_an_interrupted_run_ends_with_the_same_best(
    tmp_path: Path, better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the steps after the checkpoint that it goes on from were better or not."""
    from latentdiff.training.monitor import evaluation

    monkeypatch.setattr(evaluation, "HELD_OUT", {"held_out/loss": better})
    file = diffusion(tmp_path)
    asked = [*HELD_OUT, "evaluate.every=1", "evaluate.keep_best=held_out/loss", "run.steps=5", "run.save_every=3"]
    for name in ("unbroken", "resumed"):
        cli_train(file, asked, False, str(tmp_path / name))
    (tmp_path / "resumed/checkpoints/step-00000005/manifest.json").unlink()
    cli_train(file, asked, True, str(tmp_path / "resumed"))
    assert best_of(tmp_path / "unbroken") == best_of(tmp_path / "resumed")
    counts = [load_latest(tmp_path / name) for name in ("unbroken", "resumed")]
    assert counts[0] is not None and counts[1] is not None
    assert counts[0].state["best"] == counts[1].state["best"]
    ours, theirs = model_of(tmp_path / "unbroken"), model_of(tmp_path / "resumed")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_better_model_than_that_of_the_checkpoint_gives_way_to_it(tmp_path: Path) -> None:
    first, second, third = (Best("kid", step, 1.0 / step) for step in (1, 2, 3))

    def kept(best: Best) -> None:
        keep(tmp_path, best, lambda place: (place / "weights").write_text(str(best.step)))

    kept(first)
    kept(second)
    settle(tmp_path)  # a checkpoint that has the second
    kept(third)
    kept(Best("kid", 4, 0.1))
    restore(tmp_path, second)
    assert (tmp_path / "best/weights").read_text() == "2" and best_of(tmp_path)["step"] == 2
    kept(third)
    shutil.rmtree(tmp_path / "best")  # killed between two renames
    restore(tmp_path, second)
    assert (tmp_path / "best/weights").read_text() == "2"
    kept(third)
    restore(tmp_path, Best())
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_never_the_best() -> None:
    assert not Best().improved_by(float("nan"), "lower") and not Best().improved_by(float("-inf"), "lower")
    assert Best().improved_by(5.0, "lower") and not Best("kid", 1, 5.0).improved_by(5.0, "lower")
    assert Best("psnr", 1, 5.0).improved_by(6.0, "higher") and not Best("kid", 1, 5.0).improved_by(6.0, "lower")


def test_a_failing_evaluation_ends_no_run(
    tmp_path: Path, logged: Scalars, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = diffusion(tmp_path)

    def fail(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("latentdiff.training.monitor.evaluation.measure", fail)
    monkeypatch.setattr("latentdiff.training.monitor.evaluation.evaluate", fail)
    asked = [*HELD_OUT, "evaluate.every=2", "evaluate.keep_best=kid", "evaluate.metrics=[kid]", "evaluate.patience=1"]
    cli_train(file, asked, False, None)
    assert logged[4]["failed_evaluations"] == 2
    assert "an evaluation failed (RuntimeError: no such luck); training goes on" in capsys.readouterr().err
    assert (tmp_path / "diffusion/model/model_index.json").is_file() and not (tmp_path / "diffusion/best").exists()


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("diffusion", {"metrics": ["kidd"]}, "'kidd' is unknown; did you mean 'kid'"),
        ("diffusion", {"metrics": ["kid", "kid"]}, "names one twice"),
        ("diffusion", {"metrics": ["psnr"]}, "psnr does not change in this stage"),
        ("autoencoder", {"metrics": ["kid"]}, "kid does not change in this stage"),
        ("diffusion", {"metrics": ["speed"]}, "speed is not measured while training"),
        ("diffusion", {"keep_best": "kid", "every": 5}, "'kid' is not measured; add kid to evaluate.metrics"),
        ("diffusion", {"keep_best": "held_out/los", "every": 5}, "not measured; did you mean 'held_out/loss'"),
        ("diffusion", {"keep_best": "held_out/loss"}, "set evaluate.every above 0"),
        ("diffusion", {"patience": 2, "every": 5}, "name it as evaluate.keep_best"),
        ("autoencoder", {"metrics": ["lpips"]}, "lpips needs loss.lpips_weights"),
        ("autoencoder", {"every": -1}, "evaluate.every: input should be greater"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_the_config(
    tmp_path: Path, stage: str, values: dict[str, Any], message: str
) -> None:
    file = Path(recipe(tmp_path, stage))
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "evaluate": values}))
    with pytest.raises(InputError, match=message):
        load_config(file)


def test_what_is_missing_is_refused_before_the_data_are_opened(tmp_path: Path) -> None:
    file = recipe(tmp_path, "diffusion")  # whose pictures are not there
    for values, message in (
        (["evaluate.features=incepton", "evaluate.metrics=[kid]"], "did you mean 'inception'"),
        ([f"evaluate.judge={tmp_path / 'judge'}", "evaluate.metrics=[clip]"], "judge"),
    ):
        with pytest.raises(LatentDiffError, match=message):
            cli_train(file, values, False, None)
        assert not (tmp_path / "diffusion").exists()


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_values_of_held_out_pictures_need_such(tmp_path: Path, stage: str) -> None:
    pictures(tmp_path / "pictures", 6)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    name = "held_out_psnr" if stage == "autoencoder" else "held_out/loss"
    options = ["evaluate.every=1", f"evaluate.keep_best={name}"]
    with pytest.raises(InputError, match=f"{name} needs held-out pictures.*data.held_out"):
        cli_train(recipe(tmp_path, stage), options, False, str(tmp_path / "new"))


def test_distances_of_too_few_pictures_are_refused(tmp_path: Path) -> None:
    file = diffusion(tmp_path)
    with pytest.raises(InputError, match="kid needs 8 held-out pictures or more, got 4; raise"):
        cli_train(file, [*HELD_OUT, "evaluate.metrics=[kid]", "evaluate.n=4"], False, str(tmp_path / "new"))


@pytest.mark.long
def test_check_says_what_will_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "pictures", 24)
    options = [
        *HELD_OUT,
        "evaluate.every=3",
        "evaluate.metrics=[psnr]",
        "evaluate.keep_best=psnr",
        "evaluate.patience=2",
    ]
    cli_check(recipe(tmp_path, "autoencoder"), options, None)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation")]
    assert "held_out_psnr, psnr of" in line and "every 3 steps, 2 times; the best by psnr is kept, patience 2" in line


def test_every_metric_is_of_a_stage_or_left_to_the_command() -> None:
    of_models = {name for metrics in OF_TASKS.values() for name in metrics}
    assert {*of_models, *OF_AUTOENCODERS, "memorised", "speed"} == {*METRICS}
