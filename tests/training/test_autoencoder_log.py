"""What the log of an autoencoder run says of terms and latents: right, and without effect on the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.monitor.instruments import gradient_norms, latent_scalars
from torch import nn
from torch._functorch import config as functorch

from latentdiff.commands.train import train as cli_train
from tests.training.test_distributed import logged
from tests.training.test_lpips import network, weights  # noqa: F401  (fixtures)
from tests.training.test_stages import pictures, recipe

LOSS = ["loss.adversarial=0.5", "loss.adversarial_start=1", "loss.r1=1", "loss.lpips=0.5"]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_run_that_measures_ends_as_one_that_does_not(
    tmp_path: Path,
    weights: Path,  # noqa: F811
    checkpointing: str,
) -> None:
    pictures(tmp_path / "pictures", 6)
    file = recipe(tmp_path, "autoencoder")
    options = [*LOSS, f"loss.lpips_weights={weights}", f"run.gradient_checkpointing={checkpointing}"]
    ends = []
    for name, every in (("with", 1), ("without", 1000)):
        cli_train(file, [*options, f"run.log_every={every}"], False, str(tmp_path / name))
        checkpoint = load_latest(tmp_path / name)
        assert checkpoint is not None
        state = torch.get_rng_state()
        ends.append({f"{part}.{key}": t for part, named in checkpoint.tensors.items() for key, t in named.items()})
        ends[-1]["random"] = state
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    log = logged(tmp_path / "with")
    always, judged = ("l1", "gradient", "ssim", "kl", "lpips"), ("adversarial", "discriminator", "r1")
    for name in (*always, *judged):
        norms = log[f"grad_norm/{name}"]
        assert len(norms) == len(log[name]) == (4 if name in always else 3) and min(norms) > 0
    channels = {f"latent/{kind}_{number}" for kind in ("mean", "std") for number in range(4)}
    assert {name for name in log if name.startswith("latent/")} == channels
    assert min(min(log[name]) for name in channels if "std" in name) > 0
    assert min(log["ema_distance"]) > 0 and log["skipped_steps"] == [0.0] * 4
    assert not any("/" in name for name in logged(tmp_path / "without"))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")  # of what reads the network
def test_a_compiled_network_is_gone_back_through_term_by_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "pictures", 4)
    compile_in_place, options = nn.Module.compile, ["run.compile=true", "run.log_every=1", "run.steps=1"]
    # What derives the backward pass is the usual one; what makes machine code of it takes minutes.
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_in_place(module, backend="aot_eager"))
    monkeypatch.setattr(functorch, "donated_buffer", True)
    options += ["model.mid_block_add_attention=false", "model.block_out_channels=[8]"]
    cli_train(recipe(tmp_path, "autoencoder"), options, False, None)
    log = logged(tmp_path / "autoencoder")
    assert all(log[f"grad_norm/{name}"][0] > 0 for name in ("l1", "gradient", "ssim", "kl"))


def test_the_norm_of_one_term_is_that_of_the_step(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 6)
    alone = ["loss.gradient=0", "loss.ssim=0", "loss.kl=0", "loss.l1=3", "run.log_every=1"]
    cli_train(recipe(tmp_path, "autoencoder"), alone, False, None)
    log = logged(tmp_path / "autoencoder")
    assert log["grad_norm/l1"] == pytest.approx(log["grad_norm"], rel=1e-5)


def test_norms_are_known_and_a_term_without_gradient_is_seen() -> None:
    layer = nn.Linear(2, 1)
    nn.init.zeros_(layer.weight)
    layer.bias.grad = torch.ones(1)
    output = layer(torch.tensor([[3.0, 4.0]])).sum()
    found = gradient_norms({"a": output, "b": 2 * output, "dead": output.detach()}, layer, Accelerator(cpu=True))
    norm = 26**0.5  # of 3, 4 and 1
    assert found == pytest.approx({"grad_norm/a": norm, "grad_norm/b": 2 * norm, "grad_norm/dead": 0})
    assert layer.weight.grad is None and torch.equal(layer.bias.grad, torch.ones(1))
    output.backward()  # still possible


def test_latents_that_are_known() -> None:
    latents = torch.tensor([1.0, 3.0])[:, None, None, None] * torch.tensor([1.0, -2.0])[:, None, None].expand(2, 3, 3)
    expected = {"latent/mean_0": 2.0, "latent/mean_1": -4.0, "latent/std_0": 1.0, "latent/std_1": 2.0}
    assert latent_scalars(latents) == pytest.approx(expected)
