"""LPIPS: equal to the published metric, right where the answer is known, trained through, refused where it must be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from latentdiff.training.losses import lpips
from latentdiff.training.losses.lpips import convert, main
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.checkpoints.lpips import load_lpips
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, MissingDependencyError, ModelLoadError, UnsafeModelError
from latentdiff.models import lpips as models_lpips
from latentdiff.models.lpips import SHIFT, Lpips
from tests.training.test_stages import pictures, recipe, weights_of


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Lpips:
    """A thin network of random weights, heads above zero as the published ones are."""
    monkeypatch.setattr(models_lpips, "BLOCKS", ((8, 8), (16, 16), (16, 16, 16), (16, 16, 16), (16, 16, 16)))
    network = Lpips()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.startswith("heads"):
            torch.nn.init.uniform_(parameter, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    return network.requires_grad_(False)


@pytest.fixture
def weights(network: Lpips, tmp_path: Path) -> Path:
    """Its weights in a file."""
    save_file(network.state_dict(), tmp_path / "lpips.safetensors")
    return tmp_path / "lpips.safetensors"


def images(count: int = 2, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.filterwarnings("ignore")  # of the packages that it is compared with
def test_it_is_the_published_metric(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole way: weights of both packages, those of VGG16 random, through the file."""
    pytest.importorskip("torchvision")
    reference = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    theirs = reference._LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    slices = (getattr(theirs.net, f"slice{number}") for number in range(1, 6))
    vgg16 = {f"features.{name}": tensor for part in slices for name, tensor in part.state_dict().items()}
    for name, tensor in vgg16.items():  # which start at zero
        if name.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.05)
    monkeypatch.setattr(lpips, "_vgg16", lambda: vgg16)
    convert(tmp_path / "lpips.safetensors")
    ours = load_lpips(tmp_path / "lpips.safetensors")
    for side in (16, 36):
        first, second = images(side=side).requires_grad_(), images(side=side, seed=1)
        found, expected = ours(first, second), theirs(first, second).flatten()
        assert expected.min() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        slopes = [torch.autograd.grad(distance.sum(), first)[0] for distance in (found, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-7)


def test_distances_that_are_known(network: Lpips) -> None:
    """Without biases the picture that is shifted to zero has no features, and a unit vector is 1 away from that."""
    for head in network.heads:
        torch.nn.init.ones_(head.weight)  # type: ignore[arg-type]
    nothing, some = torch.tensor(SHIFT)[:, None, None].expand(2, 3, 32, 32), images()
    assert torch.equal(network(some, some), torch.zeros(2))
    torch.testing.assert_close(network(nothing, some), torch.full((2,), 5.0), rtol=1e-3, atol=0)
    assert [tuple(one.shape) for one in network.features(some)] == [
        (2, block[-1], 32 >> number, 32 >> number) for number, block in enumerate(models_lpips.BLOCKS)
    ]


def test_gradients_go_through_to_the_reconstruction_and_no_further(weights: Path) -> None:
    network = load_lpips(weights)
    reconstruction, target = images().requires_grad_(), images(seed=1)
    network(reconstruction, target).sum().backward()
    slope = reconstruction.grad
    assert slope is not None and slope.abs().max() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.no_grad():
        step = 0.02 * slope / slope.norm()
        after, before = network(reconstruction + step, target).sum(), network(reconstruction - step, target).sum()
    assert (after - before).item() / 0.04 == pytest.approx(slope.norm().item(), rel=0.05)


def test_a_run_learns_from_it_alone_and_resumes_to_the_bit(weights: Path, tmp_path: Path) -> None:
    """What a network under `no_grad`, the classic mistake, would leave where it was."""
    pictures(tmp_path / "pictures", 4)
    off = {"l1": 0.0, "gradient": 0.0, "ssim": 0.0, "kl": 0.0}
    loss = f"loss={json.dumps(off | {'lpips': 1.0, 'lpips_weights': str(weights)})}"
    file = recipe(tmp_path, "autoencoder", run__save_every=1, run__keep_checkpoints=9, run__steps=3)
    cli_train(file, [loss], False, None)
    last = weights_of(tmp_path / "autoencoder")
    for number in (3, 2):
        (tmp_path / f"autoencoder/checkpoints/step-{number:08d}/manifest.json").unlink()
    first = weights_of(tmp_path / "autoencoder")
    still = [name for name, tensor in first.items() if torch.equal(tensor, last[name])]
    assert not still
    cli_train(file, [loss], True, None)
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights_of(tmp_path / "autoencoder").items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss.lpips=1"],
            r"loss.lpips needs loss.lpips_weights: `python -m latentdiff",
        ),
        (["loss.lpips=1", "loss.lpips_weights=no.safetensors"], r"no.safetensors is none; make it with `python -m"),
        (
            ["loss.lpips=1", "loss.lpips_weights=x", "data.size=8"],
            "needs pictures of 16 pixels or more, got data.size 8",
        ),
    ],
)
def test_what_is_missing_is_said_before_the_run_begins(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cli_train(recipe(tmp_path, "autoencoder"), overrides, False, None)
    assert not (tmp_path / "autoencoder").exists()


def test_other_files_are_refused(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    good: Any = load_file(weights)
    file = tmp_path / "other.safetensors"
    for change, message in (
        ({"heads.0.weight": None}, r"expected \[1, 8, 1, 1\] as heads.0.weight, got nothing; make it with"),
        ({"more": torch.zeros(1)}, r"expected nothing as more, got \[1\]"),
        (
            {"heads.1.weight": torch.zeros(1, 3, 1, 1)},
            r"expected \[1, 16, 1, 1\] as heads.1.weight, got \[1, 3, 1, 1\]",
        ),
        ({"blocks.0.0.bias": torch.zeros(8).int()}, r"expected \[8\] as blocks.0.0.bias, got I32"),
        ({"blocks.0.0.bias": torch.full((8,), torch.nan)}, r"blocks.0.0.bias has 8 values that are NaN"),
    ):
        save_file({name: tensor for name, tensor in (good | change).items() if tensor is not None}, file)
        with pytest.raises(ModelLoadError, match=message):
            load_lpips(file)
    torch.save({"heads": torch.zeros(1)}, file)
    with pytest.raises(UnsafeModelError):
        load_lpips(file)


def test_making_the_file_says_what_is_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lpips, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentdiff\[lpips\]'"):
        convert(tmp_path / "x.safetensors")
    monkeypatch.setattr(sys, "argv", ["lpips", str(tmp_path / "x.safetensors")])
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_nothing_is_loaded_where_it_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "pictures", 4)
    monkeypatch.setattr(Lpips, "forward", None)
    cli_train(recipe(tmp_path, "autoencoder"), ["loss.lpips_weights=no.safetensors", "run.steps=1"], False, None)
    assert (tmp_path / "autoencoder/vae/config.json").is_file()
