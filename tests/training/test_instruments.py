"""What the log says of speed, latents and loss terms: right where it can be worked out, and without a trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from latentdiff.training.config import LoraConfig
from latentdiff.training.data.batches import Batch
from latentdiff.training.loop.run import checkpoint_gradients
from latentdiff.training.monitor import export
from latentdiff.training.monitor.instruments import (
    LatentStatistics,
    Speed,
    forward_flops,
    gradient_norms,
    measure_speed,
)
from latentdiff.training.networks.lora import Adapted
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.commands.train import train as cli_train
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from latentdiff.training import train_diffusion as diffusion
from tests.conftest import UNET
from tests.training.test_distributed import logged
from tests.training.test_objective import LEARNED, recipe
from tests.training.test_stages import pictures, weights_of


@pytest.fixture(autouse=True)
def speed_not_measured() -> None:
    """Measure it here, unlike in the other tests of training."""


def network() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(UNetConfig.from_dict({**UNET, "dropout": 0.5}))


def inputs(count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(count, 4, 8, 8), torch.zeros(count, dtype=torch.int64), torch.ones(count, 5, 16)


def counted(model: nn.Module, count: int = 1) -> tuple[int, int]:
    """Return the FLOPs of a forward pass and of one there and back."""
    both = FlopCounterMode(display=False)
    with both, sdpa_kernel(SDPBackend.MATH):
        output = model(*inputs(count))
        forward = both.get_total_flops()
        output.square().mean().backward()
    return forward, both.get_total_flops()


def batch_of(latents: Tensor) -> Batch:
    return Batch(latents, torch.zeros(len(latents), 1, 1), torch.zeros(len(latents), dtype=torch.bool))


def test_flops_are_those_of_training_and_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, accelerator = network(), Accelerator(cpu=True)
    forward, both = counted(model, 3)
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    model.zero_grad()
    assert 3 * forward_flops(model, *inputs()) == forward
    speed = measure_speed(model, *inputs(), accelerator=accelerator)
    assert speed.flops == forward and both == pytest.approx(3 * speed.flops, rel=0.02)
    checkpoint_gradients(model)
    monkeypatch.setattr(model, "_compiled_call_impl", lambda *_: pytest.fail("what was compiled was called"))
    more = measure_speed(model, *inputs(), accelerator=accelerator, more=0.5)
    assert more.flops == pytest.approx(3.5 / 3 * speed.flops) and more.peak > 1e6
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_lora_leaves_out_the_gradients_of_weights() -> None:
    model = Adapted(network(), LoraConfig(rank=1))
    _, both = counted(model)
    assert measure_speed(model, *inputs(), accelerator=Accelerator(cpu=True)).flops == pytest.approx(both, rel=0.1)


def test_utilisation_is_the_share_of_the_peak() -> None:
    assert Speed(flops=2e9, peak=1e12).scalars(100.0) == {"flops_per_second": 2e11, "utilisation": 0.2}


def test_latents_are_measured_from_line_to_line() -> None:
    statistics, accelerator = LatentStatistics(), Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 3, size, size, generator=generator) * 2 + 1 for size in (4, 4, 8)]
    batches = list(statistics.watching(map(batch_of, drawn)))
    assert all(batch.latents is latents for batch, latents in zip(batches, drawn, strict=True))
    found = statistics.scalars(accelerator)
    for channel in range(3):
        values = torch.cat([latents[:, channel].flatten() for latents in drawn]).double()
        assert found[f"latent/mean_{channel}"] == pytest.approx(float(values.mean()))
        assert found[f"latent/std_{channel}"] == pytest.approx(float(values.std(correction=0)))
    assert len(found) == 6
    list(statistics.watching([batch_of(torch.full((2, 3, 4, 4), 5.0))]))
    assert statistics.scalars(accelerator)["latent/mean_0"] == 5.0


@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_norms_are_those_of_each_terms_gradient_and_the_graph_stays(scale: float | None) -> None:
    torch.manual_seed(0)
    layers, frozen = nn.Linear(3, 2), nn.Linear(2, 1).requires_grad_(False)
    output = frozen(layers(torch.ones(4, 3)).tanh()).mean()
    terms = {"once": output, "thrice": 3 * output, "offset": layers.bias.square().sum() * 0.5}
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    norms = gradient_norms(terms, nn.Sequential(layers, frozen), accelerator)
    assert all(parameter.grad is None for parameter in layers.parameters())
    assert norms["grad_norm/thrice"] == pytest.approx(3 * norms["grad_norm/once"])
    assert norms["grad_norm/offset"] == pytest.approx(float(layers.bias.detach().norm()))
    output.backward()
    gradients = [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]
    assert norms["grad_norm/once"] == pytest.approx(float(nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "hybrid", "schedule": LEARNED, "timesteps": "importance"},
        {"self_conditioning": True, "text_encoder": "none"},
    ],
    ids=["hybrid", "self-conditioned"],
)
def test_a_run_that_is_looked_at_ends_with_the_weights_of_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    pictures(tmp_path / "pictures", 6)
    monkeypatch.setattr(export, "show_process", lambda *_: None)
    given = ["model.dropout=0.2", "run.accumulation=2", "run.gradient_checkpointing=true", "run.sample_every=100"]
    cli_train(recipe(tmp_path, **changes), [*given, "run.log_every=2"], False, str(tmp_path / "with"))
    with monkeypatch.context() as changed:
        changed.setattr(diffusion, "measure_speed", lambda *_, **__: None)
        changed.setattr(diffusion, "gradient_norms", lambda *_: pytest.fail("nothing is logged"))
        changed.setattr(LatentStatistics, "watching", lambda self, batches: batches)
        cli_train(recipe(tmp_path, **changes), [*given, "run.log_every=100"], False, str(tmp_path / "without"))
    ours, theirs = weights_of(tmp_path / "with"), weights_of(tmp_path / "without")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    log = logged(tmp_path / "with")
    assert len(log["utilisation"]) == len(log["latent/std_2"]) == 2 and 0 < min(log["utilisation"]) < 2
    ratios = [rate / images for rate, images in zip(log["flops_per_second"], log["images_per_second"])]
    assert ratios == pytest.approx(ratios[:1] * 2) and ratios[0] > 1e6
    assert all(abs(value) < 1 for value in log["latent/mean_0"]) and min(log["latent/std_0"]) > 0
    norms = {name: values for name, values in log.items() if name.startswith("grad_norm/")}
    assert set(norms) == ({"grad_norm/simple", "grad_norm/vlb"} if "loss" in changes else set())
    assert all(math.isfinite(value) and value > 0 for values in norms.values() for value in values)


def test_a_compiled_network_is_not_gone_through_term_by_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "pictures", 6)
    compiled: list[nn.Module] = []
    monkeypatch.setattr(export, "show_process", lambda *_: None)
    monkeypatch.setattr(diffusion, "compile_checked", lambda network, *_, **__: compiled.append(network))
    monkeypatch.setattr(diffusion, "gradient_norms", lambda *_: pytest.fail("its graph was to be kept"))
    together = ["run.compile=true", "run.accumulation=2", "run.gradient_checkpointing=true", "optimizer.kind=adafactor"]
    cli_train(recipe(tmp_path, loss="hybrid", schedule=LEARNED), [*together, "run.log_every=1"], False, None)
    assert len(compiled) == 1 and len(logged(tmp_path / "run")["loss"]) == 4
