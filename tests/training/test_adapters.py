"""LoRA layers while they are trained: nothing at the start, alone moved, and the file's numbers at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latentdiff.training.config import LoraConfig
from latentdiff.training.networks.lora import Adapted

from latentdiff.errors import InputError
from latentdiff.models.lora import merge
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import CONTEXT, UNETS, randomize

EVERYTHING = ["attention", "feed_forward", "convolution"]


def unet(kind: str) -> UNet2DConditionModel:
    network = UNet2DConditionModel(UNetConfig.from_dict(UNETS[kind]))
    randomize(network)
    return network.eval()


def call(network: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    output: torch.Tensor = network(latents, torch.tensor([3, 700]), torch.randn(2, 5, CONTEXT, generator=generator))
    return output


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("layers", [["attention"], ["feed_forward"], ["convolution"], EVERYTHING])
def test_what_is_trained_is_what_is_merged(kind: str, layers: Any) -> None:
    """Zero at the start; and after training the same output as the file's factors in the weights give."""
    plain, config = unet(kind), LoraConfig(rank=3, alpha=1.5, layers=layers)
    adapted = Adapted(unet(kind), config).eval()
    assert torch.equal(call(adapted), call(plain))
    optimizer = torch.optim.Adam(adapted.adapters.parameters(), 0.05)
    for _ in range(4):
        call(adapted).square().mean().backward()
        optimizer.step()
    without = [name for name, weight in adapted.adapters.named_parameters() if weight.grad is None]
    assert without == []
    before = plain.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.network.state_dict().items())
    with torch.no_grad():
        trained = call(adapted)
        assert (trained - call(plain)).abs().max() > 1e-3
        torch.testing.assert_close(call(merge(plain, [(adapted.factors(), 1.0)])), trained, rtol=1e-4, atol=1e-5)


def test_only_the_kinds_that_were_asked_for() -> None:
    names = {kind: set(Adapted(unet("sd1"), LoraConfig(layers=[kind])).factors()) for kind in EVERYTHING}  # type: ignore[list-item]
    assert all("attn" in name or ".proj_" in name for name in names["attention"])
    assert all(".ff." in name for name in names["feed_forward"])
    assert all("conv" in name for name in names["convolution"])
    together = set(Adapted(unet("sd1"), LoraConfig(layers=EVERYTHING)).factors())  # type: ignore[arg-type]
    assert together == names["attention"] | names["feed_forward"] | names["convolution"]


def test_dropout_is_for_training_alone() -> None:
    adapted = Adapted(unet("sd1"), LoraConfig(dropout=0.5))
    for parameter in adapted.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapted.eval()
    assert torch.equal(call(adapted), call(adapted))
    adapted.train()
    assert not torch.equal(call(adapted), call(adapted))


def test_layers_that_are_not_there() -> None:
    with pytest.raises(InputError, match=r"lora.layers attention: the network has none of them"):
        Adapted(torch.nn.Linear(3, 3), LoraConfig())
