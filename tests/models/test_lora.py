"""Low-rank changes: the same as running both factors beside the layer, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from latentdiff.errors import ModelMismatchError, ModelValueError
from latentdiff.models.lora import Factors, factors_fit, merge, share_weights


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 8, 1)).requires_grad_(False)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_linear_layers() -> None:
    plain, x = network(), torch.randn(7, 6)
    factors = Factors(torch.randn(2, 6), torch.randn(5, 2), alpha=3.0)
    merged = merge(plain, [({"0": factors}, 0.5)])
    expected = plain[0](x) + 0.5 * 3.0 / 2 * x @ factors.down.T @ factors.up.T
    torch.testing.assert_close(merged[0](x), expected)


def test_convolutions() -> None:
    plain, x = network(), torch.randn(2, 4, 9, 9)
    locon = Factors(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), alpha=1.0)
    pixelwise = Factors(torch.randn(3, 4, 1, 1), torch.randn(8, 3, 1, 1), alpha=3.0)
    merged = merge(plain, [({"1": locon, "2": pixelwise}, 1.0)])
    beside = F.conv2d(F.conv2d(x, locon.down, padding=1), locon.up) / 2
    torch.testing.assert_close(merged[1](x), plain[1](x) + beside, rtol=1e-4, atol=1e-5)
    beside = F.conv2d(F.conv2d(x, pixelwise.down), pixelwise.up)
    torch.testing.assert_close(merged[2](x), plain[2](x) + beside, rtol=1e-4, atol=1e-5)


def test_convolutions_in_tucker_form() -> None:
    plain, x = network(), torch.randn(2, 4, 9, 9)
    down, mid, up = torch.randn(2, 4, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(6, 2, 1, 1)
    merged = merge(plain, [({"1": Factors(down, up, 4.0, mid)}, 1.0)])
    beside = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up) * 2
    torch.testing.assert_close(merged[1](x), plain[1](x) + beside, rtol=1e-4, atol=1e-5)


def test_several_are_summed_once_rounded() -> None:
    plain = network().half()
    changes = [({"0": Factors(torch.randn(2, 6), torch.randn(5, 2), 2.0)}, weight) for weight in (0.7, -0.2, 0.1)]
    merged = merge(plain, changes)
    exact = plain[0].weight.float() + sum(weight * factors["0"].up @ factors["0"].down for factors, weight in changes)
    assert merged[0].weight.dtype == torch.float16
    assert torch.equal(merged[0].weight, exact.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_original_is_never_written_to(dtype: torch.dtype) -> None:
    plain = network().to(dtype)
    before = bits(plain)
    factors = {"0": Factors(torch.randn(2, 6), torch.randn(5, 2), 1.0)}
    merged = merge(plain, [(factors, 1.0)])
    assert bits(plain) == before != bits(merged)
    assert merged[1].weight.data_ptr() == plain[1].weight.data_ptr()
    assert merged[0].weight.data_ptr() != plain[0].weight.data_ptr()
    assert bits(merge(plain, [(factors, 0.0)])) == bits(merge(plain, [])) == before


def test_copies_move_alone() -> None:
    plain = network()
    share_weights(plain).to(torch.float16)
    assert all(parameter.dtype == torch.float32 for parameter in plain.parameters())
    tied = nn.ModuleList([plain[0], nn.Linear(6, 5)])
    tied[1].weight = tied[0].weight
    shared = share_weights(tied)
    assert shared[1].weight is shared[0].weight is not tied[0].weight


def test_what_does_not_fit_is_refused() -> None:
    factors = Factors(torch.randn(2, 6), torch.randn(5, 2), 1.0)
    for name in ("1", "9"):
        with pytest.raises(ModelMismatchError, match=f"changes layer {name}, which this model has not"):
            merge(network(), [({name: factors}, 1.0)])
    with pytest.raises(ModelValueError, match=r"0 is not finite in torch\.float16 with its LoRAs"):
        merge(network().half(), [({"0": factors}, 1e6)])


def test_shapes() -> None:
    assert factors_fit((5, 6), (2, 6), (5, 2)) and factors_fit((5, 6), (2, 6, 1, 1), (5, 2, 1, 1))
    assert factors_fit((5, 6, 1, 1), (2, 6), (5, 2)) and factors_fit((5, 6, 3, 3), (2, 6, 3, 3), (5, 2, 1, 1))
    assert factors_fit((5, 6, 3, 3), (2, 6, 1, 1), (5, 2, 1, 1), (2, 2, 3, 3))
    wrong = [((2, 6), (5, 3)), ((2, 5), (5, 2)), ((0, 6), (5, 0)), ((), ()), ((2,), (5,)), ((2, 6, 3, 3), (5, 2))]
    assert not any(factors_fit((5, 6), down, up) for down, up in wrong)
    assert not factors_fit((5, 6, 3, 3), (2, 6), (5, 2)) and not factors_fit((5, 6), (2, 6), (5, 2), (2, 2))
