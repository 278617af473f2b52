"""What the loops share: a compiled network whose gradients are wrong is refused."""

import contextlib
from typing import Any

import pytest
import torch
from latentdiff.training.loop.run import compile_checked
from torch import Tensor, nn

from latentdiff.errors import InputError


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3))
    nn.init.zeros_(layers[2].weight)  # type: ignore[arg-type]
    return layers


def test_compilation_that_loses_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_the_graph(module: Any) -> None:
        def forward(x: Tensor) -> Tensor:
            return module[2](module[1](module[0](x)).detach())

        module.forward = forward

    monkeypatch.setattr(nn.Module, "compile", cut_the_graph)
    with pytest.raises(InputError, match=r"changes this network's gradients by .*; set run.compile to false"):
        compile_checked(network(), torch.ones(2, 3, 8, 8), autocast=contextlib.nullcontext())


def test_compilation_that_changes_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    module = network()
    compile_checked(module, torch.ones(2, 3, 8, 8), autocast=contextlib.nullcontext())
    assert compiled[-1] is module and len(compiled) == 2


class Rounded(nn.Module):
    """A network whose gradient is off by a share in reduced precision."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.weight, self.share = nn.Parameter(torch.ones(4)), share

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (1 + self.share if torch.is_autocast_enabled("cpu") else 1)


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_a_compiler_may_be_off_by_what_its_precision_is(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Gradients are compared with those in float32, of which reduced precision loses some by itself."""

    def compiled(more: float) -> Any:
        def change(module: Any) -> None:
            module.share = share + more

        return change

    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(nn.Module, "compile", compiled(share * 0.3))
    compile_checked(Rounded(share), torch.ones(2, 4), autocast=autocast)
    monkeypatch.setattr(nn.Module, "compile", compiled(0.5))
    with pytest.raises(InputError, match=r"changes this network's gradients by .*, rounding by"):
        compile_checked(Rounded(share), torch.ones(2, 4), autocast=autocast)
