"""Bits per dimension of pictures and of latents, where the truth is known, and the command that prints them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import latentdiff.evaluate.likelihood as module
from latentdiff import Pipeline
from latentdiff.checkpoints import save_pipeline
from latentdiff.checkpoints.single_file import ENLARGING
from latentdiff.cli import main
from latentdiff.diffusion import Call, NoiseSchedule
from latentdiff.diffusion.prediction import Denoiser
from latentdiff.errors import InputError
from latentdiff.evaluate import negative_log_likelihood
from latentdiff.evaluate.likelihood import network_of
from latentdiff.evaluate.run import measure
from tests.checkpoints.test_single_file import components_of, tiny
from tests.evaluate.small import evaluation, images
from tests.models.test_pixels import components
from tests.models.tiny import noise_picture

MEAN, STD = 0.1, 0.25


def exact(*_: object) -> Denoiser:
    """The x0 estimate of independent values N(MEAN, STD^2)."""

    def denoise(x: Tensor, call: Call) -> Tensor:
        sigmas = call.sigmas.reshape(-1, 1, 1, 1)
        return MEAN + STD**2 / (STD**2 + sigmas**2) * (x - MEAN)

    return Denoiser(denoise, None)


def test_figures_of_gaussian_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit grey pixels of a known normal distribution: the ODE finds their entropy, the bound lies above it."""
    monkeypatch.setattr(module, "network_of", exact)
    generator = torch.Generator().manual_seed(0)
    values = MEAN + STD * torch.randn(6, 1, 32, 32, generator=generator)
    images = ((values.clamp(-1, 1) + 1) * 127.5).round().div(127.5).sub(1).expand(-1, 3, -1, -1)
    schedule = NoiseSchedule()  # fixed_small, as the exact estimate learns no variance
    figures = negative_log_likelihood(replace(components(), schedule=schedule), images, [""] * 6)
    normal = torch.distributions.Normal(MEAN, STD)
    truth = float(-(normal.log_prob(images[:, 0]).mean() + math.log(2 / 255)) / math.log(2))
    assert figures["of"] == "pixels" and figures["images"] == 6
    assert figures["ode"]["mean"] == pytest.approx(truth, abs=0.01), figures["ode"]
    assert truth < figures["bound"]["total"]["mean"] < truth + 1
    terms = sum(figures["bound"][name]["mean"] for name in ("L_T", "L_t", "L_0"))
    assert terms == pytest.approx(figures["bound"]["total"]["mean"], abs=1e-4)


def test_latents_and_autoencoder_stand_apart(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents get a density; the autoencoder's cost is that of a Gaussian of its own error."""
    monkeypatch.setattr(module, "network_of", exact)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    quick = replace(pipe.components, schedule=NoiseSchedule(num_train_timesteps=50, beta_end=0.2))
    figures = negative_log_likelihood(quick, images, ["a"] * 3, ode_steps=10)
    assert figures["of"] == "latents"
    assert set(figures) == {"images", "of", "bound", "ode", "autoencoder"}
    bits = figures["autoencoder"]["bits_per_pixel_value"]["mean"]
    posterior = pipe.autoencoder.encode(images)
    error = (images - pipe.autoencoder.decode(posterior.mode())).square().mean()
    expected = 0.5 * math.log2(2 * math.pi * math.e * float(error)) + math.log2(255 / 2)
    assert bits == pytest.approx(expected, abs=0.2)


def test_the_command_prints_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = components()
    schedule = replace(model.schedule, num_train_timesteps=20, beta_schedule="linear", beta_end=0.4)
    save_pipeline(replace(model, schedule=schedule), tmp_path / "model", dtype=None)
    (tmp_path / "data").mkdir()
    rows = []
    for index in range(3):
        noise_picture(8, 8, seed=index).save(tmp_path / f"data/{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": "two"}))
    (tmp_path / "data/metadata.jsonl").write_text("\n".join(rows))
    call = ["evaluate", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--split", "train"]
    call += ["--metrics", "nll", "--out", str(tmp_path / "two")]
    assert main([*call, "--n", "2", "--json"]) == 0
    figures = {one["name"]: one for one in json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]}
    total = figures["nll/bound/total"]
    assert total["estimate"]["n"] == 2 and math.isfinite(total["estimate"]["value"]) and total["protocol"]["n"] == 2
    assert main([*call, "--out", str(tmp_path / "all")]) == 0
    printed = capsys.readouterr().out
    assert "nll/bound/total: " in printed and "bits/dim of 3" in printed and "split train" in printed
    assert main([*call, "--metrics", "nil"]) == 2
    assert "metric 'nil' is unknown; did you mean 'nll'" in capsys.readouterr().err
    assert main([*call, "--n", "4", "--out", str(tmp_path / "more")]) == 2
    assert "--n must be at most the 3 pictures that data has of the split train, got 4" in capsys.readouterr().err
    assert main([*call, "--split", "test"]) == 2
    assert "has no split 'test'" in capsys.readouterr().err


def test_figures_that_are_not_finite_are_refused(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {"mean": math.nan, "standard_error": 0.1}
    monkeypatch.setattr(module, "negative_log_likelihood", lambda *_, **__: {"of": "latents", "ode": bits})
    with pytest.raises(InputError, match=r"not finite \(nll/ode\); try --dtype float32"):
        measure(evaluation(tmp_path, pipe.components, images(3)), ["nll"])


def test_long_captions_are_read_to_their_end(pipe: Pipeline) -> None:
    """In as many windows as they take, and without a say in what the others of a batch cost."""
    long, short = "the fox " * 9, "the fox"
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = Call(0, torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.full((3,), 400.0))
    one = Call(0, torch.arange(1), torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.full((1,), 400.0))
    with torch.no_grad():
        together = network_of(pipe.components, [long, short, long + "cat"])(x, call)
        for row, text in enumerate((long, short, long + "cat")):
            torch.testing.assert_close(
                network_of(pipe.components, [text])(x[row : row + 1], one), together[row : row + 1]
            )
        cut = network_of(pipe.components, [long])(x[2:], one)
    assert not torch.allclose(cut, together[2:], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "channels", "message"),
    [
        ("Stable Diffusion 1.x", 9, "fills in components of pictures"),
        (ENLARGING, 4, "enlarges pictures"),
        ("Stable Diffusion XL", 4, "is told sizes too"),
    ],
)
def test_models_that_are_told_more_than_a_text_are_refused(family: str, channels: int, message: str) -> None:
    with pytest.raises(InputError, match=f"given a text alone are measured, got one that {message}.*; use another"):
        negative_log_likelihood(components_of(tiny(family), channels), torch.zeros(1, 3, 32, 32), ["a fox"])
