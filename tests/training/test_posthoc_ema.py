"""Post-hoc EMA: profiles against their closed form, averages of other widths against kept ones, runs as without it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latentdiff.training.check.diffusion import examine_disk
from latentdiff.training.config import RunConfig, load_config, parse_config
from latentdiff.training.loop import posthoc_ema
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.loop.ema import Ema
from latentdiff.training.loop.posthoc_ema import (
    SIGMA_RELS,
    PowerEma,
    average_of,
    export,
    fit_profile,
    gamma_of,
    inner_products,
    main,
    power_emas,
    save_snapshot,
    sigma_rel_of,
    snapshots,
)
from latentdiff.training.loop.state import RunState
from safetensors.torch import load_file
from torch import nn

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, ModelLoadError
from tests.training.test_stages import pictures, recipe, weights_of

UPDATES, EVERY, WIDTH = 2000, 25, 64
# Of reconstructions, as shares of how far the average is from the live weights: from float32, and as it is stored.
TOLERANCES = {
    0.03: (2e-3, 3e-2),
    0.05: (1e-5, 5e-3),
    0.07: (5e-5, 5e-3),
    0.1: (1e-5, 5e-3),
    0.15: (5e-5, 3e-3),
    0.2: (5e-4, 2e-3),
    0.25: (1e-2, 1e-2),
}
MAIN: Any = SimpleNamespace(is_main_process=True)


def weights_of_steps(sigma_rel: float, end: int) -> np.ndarray:
    """How much each of the first steps counts in an average after the last of them, (end,) float64."""
    return np.diff((np.arange(end + 1) / end) ** (gamma_of(sigma_rel) + 1))


def keep_snapshots(folder: Path) -> np.ndarray:
    """Write the snapshots of weights that walk at random, and return the weights (UPDATES, WIDTH) of every step."""
    run = RunConfig(out=str(folder), steps=UPDATES, batch_size=1, ema_snapshots=EVERY)
    rng = np.random.default_rng(0)
    steps = (rng.normal(size=WIDTH) + 0.02 * rng.normal(size=(UPDATES, WIDTH)).cumsum(axis=0)).astype(np.float32)
    layer = nn.Linear(WIDTH, 1, bias=False)
    averages = power_emas(layer, run)
    for number, weights in enumerate(steps, start=1):
        layer.weight.data = torch.from_numpy(weights)[None]
        for average in averages.values():
            average.update(layer)
        save_snapshot(run, number, averages, MAIN)
    return steps


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Snapshots as runs have them, and all weights."""
    folder = tmp_path_factory.mktemp("walk")
    return folder, keep_snapshots(folder)


def test_widths_and_exponents() -> None:
    # The two pairs that the paper gives.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    for sigma_rel in (0.001, 0.05, 0.1, 0.2, 0.279):
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)
        shares = weights_of_steps(sigma_rel, 100_000)
        places = (np.arange(100_000) + 0.5) / 100_000
        mean = (shares * places).sum()
        assert (shares * (places - mean) ** 2).sum() ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)
    for wrong in (0.0, -0.1, 0.28, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"sigma_rel must be above 0 and below 0\.28, got"):
            gamma_of(wrong)


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_kept_averages_are_the_closed_form_and_forget_the_start(sigma_rel: float) -> None:
    layer: Any = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1e6)
    average, values = PowerEma(layer, sigma_rel), np.random.default_rng(0).normal(size=300)
    for end, value in enumerate(values, start=1):
        layer.weight.data.fill_(value)
        average.update(layer)
        expected = (weights_of_steps(sigma_rel, end) * values[:end]).sum()
        assert average.weights["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_inner_products_are_integrals() -> None:
    gammas, ends = np.array([16.97, 6.94, 1.0]), np.array([0.5, 1.0, 0.8])
    places = (np.arange(200_000) + 0.5) / 200_000
    profiles = [(g + 1) * places**g / end ** (g + 1) * (places < end) for g, end in zip(gammas, ends)]
    expected = [[(one * other).mean() for other in profiles] for one in profiles]
    assert np.allclose(inner_products(gammas, ends, gammas, ends), expected, rtol=1e-3)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_any_width_is_the_average_that_would_have_been_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    monkeypatch.setattr(posthoc_ema, "STORED", stored)
    steps = keep_snapshots(tmp_path)
    for step in (UPDATES, UPDATES // 2):
        for sigma_rel, tolerances in TOLERANCES.items():
            found, error, _ = average_of(tmp_path, sigma_rel, step)
            expected = weights_of_steps(sigma_rel, step) @ steps[:step]
            tolerance = tolerances[stored == torch.float16] * np.abs(steps[step - 1] - expected).max()
            assert np.abs(found["weight"].numpy() - expected).max() < tolerance, sigma_rel
            assert error < (0.01 if sigma_rel < 0.25 else 0.03)


@pytest.mark.parametrize("step", [UPDATES, UPDATES // 2])
def test_what_was_stored_comes_back_to_rounding(walk: tuple[Path, np.ndarray], step: int) -> None:
    run, _ = walk
    stored = load_file(snapshots(run)[step])
    for sigma_rel in SIGMA_RELS:
        found, error, rounding = average_of(run, sigma_rel, step)
        assert error < 1e-6 and rounding == pytest.approx(1, abs=1e-4)
        assert torch.allclose(found["weight"], stored[f"{sigma_rel}/weight"].float(), rtol=0, atol=1e-6)


def test_between_snapshots_and_with_few_of_them_the_error_says_so(walk: tuple[Path, np.ndarray]) -> None:
    run, steps = walk
    middle = UPDATES // 2 + EVERY // 2
    found, error, _ = average_of(run, 0.1, middle)
    expected = weights_of_steps(0.1, middle) @ steps[:middle]
    assert average_of(run, 0.02).rounding > 10
    assert np.abs(found["weight"].numpy() - expected).max() < 0.1 * np.abs(steps[middle - 1] - expected).max()
    assert 0.1 < error < 0.2
    gammas = np.array([gamma_of(sigma_rel) for sigma_rel in SIGMA_RELS])
    factors, alone = fit_profile(gammas, np.full(2, 1000.0), gamma_of(0.03), 1000.0)
    assert factors.sum() == pytest.approx(1) and alone > 0.1


def test_damage_and_impossible_wishes_are_told(walk: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    run, _ = walk
    with pytest.raises(InputError, match="step must be from 1 to 2000, the last snapshot of"):
        average_of(run, 0.1, UPDATES + 1)
    with pytest.raises(InputError, match="step must be from 1 to 2000"):
        average_of(run, 0.1, 0)
    with pytest.raises(InputError, match=r"has no snapshots in ema/; train with --set run.ema_snapshots=200"):
        average_of(tmp_path, 0.1)
    with pytest.raises(InputError, match=r"model is not there yet; train to the end"):
        export(run, 0.1, None, tmp_path / "out")


def test_every_flipped_bit_and_every_lost_byte_is_found(walk: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "ema").mkdir()
    (first, content), (second, other) = ((file, file.read_bytes()) for file in list(snapshots(walk[0]).values())[:2])
    place = tmp_path / "ema" / first.name
    (tmp_path / "ema" / second.name).write_bytes(other)
    for number in range(len(content)):
        flipped = bytes([content[number] ^ 1 << number % 8])
        place.write_bytes(content[:number] + (flipped + content[number + 1 :] if number % 3 else b""))
        with pytest.raises((InputError, ModelLoadError), match=r"step-00000025\.safetensors"):
            average_of(tmp_path, 0.1)
    place.write_bytes(other)  # whole, and of another step
    with pytest.raises(InputError, match=r"step-00000025\.safetensors is damaged; delete it to do without"):
        average_of(tmp_path, 0.1)
    place.unlink()
    assert average_of(tmp_path, 0.1).error < 1e-6


def test_nothing_is_stored_before_the_first_update(tmp_path: Path) -> None:
    run = RunConfig(out=str(tmp_path), steps=4, batch_size=1, ema_snapshots=1)
    layer = nn.Linear(2, 2)
    averages = power_emas(layer, run)
    save_snapshot(run, 1, averages, MAIN)  # the step was skipped
    assert not snapshots(tmp_path)
    for average in averages.values():
        average.update(layer)
    save_snapshot(run, 2, averages, MAIN)
    assert list(snapshots(tmp_path)) == [2]
    found, error, _ = average_of(tmp_path, 0.1)
    assert error < 1e-6 and torch.allclose(found["weight"], layer.weight, atol=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The config of a tiny run with snapshots each second of five steps, and its folder."""
    place = tmp_path_factory.mktemp("runs")
    pictures(place / "pictures", 6)
    cli_train(recipe(place, "autoencoder"), [], False, None)
    changes = {"run__steps": 5, "run__ema_snapshots": 2, "run__save_every": 1, "run__keep_checkpoints": 9}
    file = recipe(place, "diffusion", **changes)
    cli_train(file, [], False, None)
    return file, place / "diffusion"


def test_the_run_itself_is_as_without_snapshots(trained: tuple[str, Path], tmp_path: Path) -> None:
    file, run = trained
    cli_train(file, ["run.ema_snapshots=0"], False, str(tmp_path / "without"))
    ours, theirs = weights_of(run), weights_of(tmp_path / "without")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not (tmp_path / "without/ema").exists()
    checkpoint = load_latest(tmp_path / "without")
    assert checkpoint is not None and not any("0." in part for part in checkpoint.tensors)
    assert list(snapshots(run)) == [2, 4, 5]


def test_a_killed_run_ends_with_the_snapshots_of_the_unbroken_one(trained: tuple[str, Path], tmp_path: Path) -> None:
    file, run = trained
    broken = tmp_path / "broken"
    cli_train(file, [], False, str(broken))
    for step in (3, 4, 5):
        (broken / f"checkpoints/step-{step:08d}/manifest.json").unlink()
    (broken / "ema/step-00000007.safetensors").write_bytes(b"of another life")
    (broken / "ema/.tmp-0123").write_bytes(b"half a file")
    cli_train(file, [], True, str(broken))
    assert {path.name: path.read_bytes() for path in (run / "ema").iterdir()} == {
        path.name: path.read_bytes() for path in (broken / "ema").iterdir()
    }
    ours, theirs = load_latest(run), load_latest(broken)
    assert ours is not None and theirs is not None
    assert {"ema_0.05", "ema_0.1"} < ours.tensors.keys() == theirs.tensors.keys()
    for part, tensors in ours.tensors.items():
        assert all(torch.equal(tensor, theirs.tensors[part][name]) for name, tensor in tensors.items())


def test_the_command_writes_models_that_differ_in_the_network_alone(
    trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = trained
    for sigma_rel in ("0.05", "0.2"):
        assert main([str(run), "--sigma-rel", sigma_rel, "--out", str(tmp_path / sigma_rel)]) == 0
        assert f"saved {tmp_path / sigma_rel}; its profile is that of sigma_rel {sigma_rel}" in capsys.readouterr().out
    narrow, wide, own = (load_pipeline(folder) for folder in (tmp_path / "0.05", tmp_path / "0.2", run / "model"))
    expected = average_of(run, 0.05).weights
    assert narrow.unet is not None and wide.unet is not None
    for name, weight in narrow.unet.state_dict().items():
        assert torch.equal(weight, expected[name].half().float())
    assert not torch.equal(narrow.unet.conv_in.weight, wide.unet.conv_in.weight)
    for name, weight in own.autoencoder.state_dict().items():
        assert torch.equal(weight, wide.autoencoder.state_dict()[name])
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0}
    first, second = (Pipeline.from_pretrained(tmp_path / name)("a", **options).images for name in ("0.05", "0.2"))
    assert not torch.equal(first, second)


def test_the_command_says_in_a_line_what_is_wrong(
    trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = trained
    for options in (["--sigma-rel", "0.3"], ["--sigma-rel", "0.1", "--step", "6"]):
        assert main([str(run), *options, "--out", str(tmp_path / "out")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_check_counts_them(tmp_path: Path) -> None:
    run = RunConfig(out=str(tmp_path), steps=1000, batch_size=1, ema_snapshots=300)
    config: Any = SimpleNamespace(run=run)
    layer = nn.Linear(1024, 1024, bias=False)  # 4 MiB; two moments and three averages of the same size each
    optimizers = {"optimizer": torch.optim.AdamW(layer.parameters())}
    row = examine_disk(config, RunState({"model": layer}, optimizers, Ema(layer, 0.9), power_emas(layer, run)))
    assert row.value == "3 checkpoints of 24.0 MiB and 4 snapshots of 4.0 MiB"
    assert row.expected.startswith("88.0 MiB of ")


def test_stages_without_it_refuse_it(trained: tuple[str, Path]) -> None:
    file, run = trained
    with pytest.raises(InputError, match=r"run.ema_snapshots is for stage diffusion; set it to 0"):
        load_config(str(run.parent / "autoencoder.yaml"), ["run.ema_snapshots=2"])
    config = load_config(file).model_dump()
    tree = {name: config[name] for name in ("stage", "data", "run")}
    with pytest.raises(InputError, match=r"train.kind lora does not go with run.ema_snapshots"):
        parse_config({**tree, "start_from": "embedded", "lora": {}})
