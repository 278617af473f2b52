"""What a step keeps for its backward pass is foretold from shapes, and refused where there is no memory for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latentdiff.training.loop.activations import activation_bytes
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from latentdiff import devices
from latentdiff.cli import main
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.training import train_autoencoder, train_diffusion
from tests.models.test_unet import tiny
from tests.training import test_objective, test_stages
from tests.training.test_stages import pictures


@pytest.fixture(autouse=True)
def activations_not_estimated() -> None:
    """Estimate them here, unlike in the other tests of training."""


def kept_bytes(network: nn.Module, *inputs: Tensor) -> int:
    """Return what is in fact kept, the weights left out."""
    kept = dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = network(*inputs)  # noqa: F841  # keeps them
    for weight in network.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_shapes_tell_what_a_unet_keeps(frozen: bool) -> None:
    unet = tiny().train()
    unet.requires_grad_(not frozen)
    unet.conv_in.requires_grad_(True)
    inputs = (torch.randn(1, 4, 32, 32), torch.tensor([5]), torch.randn(1, 7, unet.config.cross_attention_dim))
    assert 0.75 < activation_bytes(unet, *inputs) / kept_bytes(unet, *inputs) <= 1.02


def test_shapes_tell_what_an_autoencoder_keeps() -> None:
    shape = {"block_out_channels": [16, 32], "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 32}
    model = AutoencoderKL(AutoencoderConfig.from_dict(shape))
    assert (
        0.75 < activation_bytes(model, torch.empty(1, 3, 32, 32)) / kept_bytes(model, torch.rand(1, 3, 32, 32)) <= 1.02
    )


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_pictures_too_large_for_the_memory_are_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    pictures(tmp_path / "pictures", 4)
    recipe: Any = test_objective.recipe(tmp_path) if stage == "diffusion" else test_stages.recipe(tmp_path, stage)
    for module in (train_autoencoder, train_diffusion):
        monkeypatch.setattr(module, "Log", lambda *_: pytest.fail("training was begun"))
    monkeypatch.setattr(devices, "machine_memory", lambda: 100 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    call = ["train", recipe, "--set", "data.size=256", "--set", "run.out=" + str(tmp_path / "run")]
    assert main(call) == main([*call, "--check"]) == 2
    for line in [line for line in capsys.readouterr().err.splitlines() if line.startswith("latentdiff: ")]:
        assert (
            line.startswith("latentdiff: a step keeps about ") and " and there are 100.0 MiB; lower run.batch" in line
        )
