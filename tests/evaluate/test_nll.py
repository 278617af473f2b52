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
from latentdiff.cli import main
from latentdiff.diffusion import Call, NoiseSchedule
from latentdiff.diffusion.prediction import Denoiser
from latentdiff.evaluate import negative_log_likelihood
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
    assert main([*call, "--images", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["nll"]["images"] == 2 and math.isfinite(figures["nll"]["bound"]["total"]["mean"])
    assert main(call) == 0
    assert "nll.bound.total: " in capsys.readouterr().out
    assert main([*call, "--metrics", "fid"]) == 2
    assert "metric 'fid' is unknown" in capsys.readouterr().err
    assert main([*call[:-1], "test"]) == 2
    assert "has no split 'test'" in capsys.readouterr().err
