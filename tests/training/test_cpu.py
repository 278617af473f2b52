"""What training on a CPU is made faster by: the same outputs and gradients, memory that stays."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from latentdiff.training.loop.cpu import SHORT, attend, tuned_for_cpu
from torch.nn import functional as F

from latentdiff.models.attention import Attention
from latentdiff.models.layers import Upsample2D


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def transposed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of kernels that convolutions were transposed with."""
    shapes: list[torch.Size] = []
    convolve: Any = F.conv_transpose2d
    monkeypatch.setattr(F, "conv_transpose2d", lambda x, w, *a, **k: shapes.append(w.shape) or convolve(x, w, *a, **k))
    return shapes


def results(layer: Upsample2D, x: torch.Tensor, size: tuple[int, int] | None) -> list[torch.Tensor]:
    """Return the layer's output and all gradients of the sum of its sines."""
    output = layer(x, size)
    return [output, *torch.autograd.grad(output.sin().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("size", [None, (10, 14)])
def test_upsampling_has_the_same_outputs_and_gradients(
    transposed: list[torch.Size], size: tuple[int, int] | None
) -> None:
    torch.manual_seed(0)
    network: Any = torch.nn.Sequential(Upsample2D(6))
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    plain = results(network[0], x, size)
    with tuned_for_cpu(network):
        tuned = results(network[0], x, size)
    assert transposed == [(6, 6, 4, 4)]
    for ours, theirs in zip(tuned, plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(network[0], x, size), plain))


def test_odd_sides_and_layers_beside_the_convolution_are_left_alone(transposed: list[torch.Size]) -> None:
    layer, x = Upsample2D(6), torch.randn(2, 6, 5, 7, requires_grad=True)
    expected = layer(x, (9, 13))
    with tuned_for_cpu(layer):
        assert torch.equal(layer(x, (9, 13)), expected)
    layer.conv.register_forward_hook(lambda module, inputs, output: output + 1)
    with tuned_for_cpu(layer):
        assert torch.equal(layer(x, (9, 13)), expected + 1) and torch.equal(layer(x), layer.forward(x))
    assert not transposed


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted by Linux")
def test_freed_memory_is_not_asked_for_again() -> None:
    script = """if True:
        import resource, sys, torch
        from latentdiff.training.loop.cpu import freed_memory_kept

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(4):
                tensors = [torch.ones(n * 2**18) for n in range(1, 40)]  # of 1 to 39 MB
                del tensors
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        many = faults()
        with freed_memory_kept():
            faults()
            few = faults()
        print(many, few, faults())
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, within, after = map(int, ended.stdout.split())
    assert within < before / 100 and after > before / 10


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [5, SHORT + 1])
def test_attention_in_bfloat16_has_the_same_outputs_and_gradients(keys: int, masked: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, length, 8).requires_grad_() for length in (7, keys, keys)]
    mask = torch.rand(2, 1, 1, keys) < 0.7 if masked else None
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in given]
    outputs = attend(*halves, attn_mask=mask), F.scaled_dot_product_attention(*given, attn_mask=mask)
    assert outputs[0].dtype == torch.bfloat16
    of_halves, expected = (
        torch.autograd.grad(out.float().sin().sum(), of) for out, of in zip(outputs, (halves, given))
    )
    for ours, theirs in zip((outputs[0], *of_halves), (outputs[1], *expected)):
        assert (ours.float() - theirs).abs().max() < 0.03 * theirs.abs().max()


def test_attention_is_torchs_again_after_training() -> None:
    layer = Attention(8, 2)
    with tuned_for_cpu(layer):
        assert layer.attend is attend
    assert layer.attend is F.scaled_dot_product_attention
