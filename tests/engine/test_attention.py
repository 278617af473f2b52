"""The choice of attention: xformers, here a plain softmax in its place, gives what torch gives."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.engine.attention import find_attention, use_attention
from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import AUTOENCODERS, UNETS, randomize, relative_error, unet_inputs

CUDA = torch.device("cuda")


def plain_softmax(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None) -> Tensor:
    """Attend as xformers documents it: (B, L, heads, d), and a bias of the full shape whose rows are aligned."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5  # (B, heads, N, L)
    if attn_bias is not None:
        assert attn_bias.shape == scores.shape
        assert attn_bias.dtype == query.dtype
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:3])
        scores = scores + attn_bias
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Install a stand-in for xformers; return whether there was a bias, call by call."""
    made: list[bool] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        made.append(attn_bias is not None)
        return plain_softmax(query, key, value, attn_bias)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = counted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return made


def networks(unet: str = "sd1") -> tuple[UNet2DConditionModel, AutoencoderKL]:
    made = (
        UNet2DConditionModel(UNetConfig.from_dict(UNETS[unet])),
        AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODERS["stable-diffusion"])),
    )
    for network in made:
        randomize(network)
        network.eval()
    return made


@pytest.mark.parametrize("name", ["sd1", "sd2", "x4-upscaler"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_xformers_gives_what_torch_gives(calls: list[bool], name: str, masked: bool) -> None:
    unet, autoencoder = networks(name)
    inputs = unet_inputs(unet.config)
    if masked:
        inputs["context_mask"] = torch.tensor([[True, True, True, False, False], [True] * 5])
    latents = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = unet(**inputs), autoencoder.decode(latents)
    assert not calls
    use_attention(find_attention("xformers", CUDA), unet, autoencoder)
    found = unet(**inputs), autoencoder.decode(latents)
    assert any(calls) == masked
    assert calls.count(False) > 1
    for ours, reference in zip(found, expected):
        assert relative_error(ours, reference) < 1e-5
    made = len(calls)
    use_attention(find_attention("sdpa", CUDA), unet, autoencoder)
    assert torch.equal(unet(**inputs), expected[0])
    assert len(calls) == made


def test_one_model_does_not_change_another(calls: list[bool]) -> None:
    use_attention(find_attention("xformers", CUDA), *networks())
    unet, autoencoder = networks()
    unet(**unet_inputs(unet.config))
    autoencoder.decode(torch.zeros(1, 4, 4, 4))
    assert not calls


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_xformers_is_for_cuda(calls: list[bool], device: str) -> None:
    message = f"runs on CUDA only, got {device}; leave --attention out"
    with pytest.raises(InputError, match=message):
        find_attention("xformers", torch.device(device))


def test_xformers_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install latentdiff\[xformers\]"):
        find_attention("xformers", CUDA)


def test_pipelines_and_the_command_line_choose(
    calls: list[bool], built_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = Pipeline.from_pretrained(built_model, device="cpu")("cat", output_type="latent", num_inference_steps=2)
    assert main(["generate", "cat", "--device", "cpu", "--attention", "xformers", "-o", "unwritten.png"]) == 2
    assert capsys.readouterr().err.startswith("latentdiff: xformers attention runs on CUDA only, got cpu; leave")
    monkeypatch.setattr("latentdiff.pipeline.find_attention", lambda name, device: find_attention(name, CUDA))
    pipe = Pipeline.from_pretrained(built_model, device="cpu", attention="xformers")
    assert relative_error(pipe("cat", output_type="latent", num_inference_steps=2).images, drawn.images) < 1e-4
    assert calls


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="attention 'xformer' is unknown; did you mean 'xformers'"):
        find_attention("xformer", CUDA)
