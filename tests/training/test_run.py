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
