"""The optimizers to choose from: what they keep, that it survives a checkpoint to the bit, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from latentdiff.training.config import OptimizerConfig
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.loop.optimizers import make_optimizer, require_optimizer, state_bytes
from latentdiff.training.loop.state import load_optimizer, optimizer_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, MissingDependencyError
from tests.training.test_stages import pictures, recipe, weights_of

KINDS = ("adamw", "adamw_8bit", "adafactor", "muon")
QUANTISED = "__bnb_optimizer_quant_state__"


class AdamW8bit(torch.optim.Optimizer):
    """Keep state as bitsandbytes does: counts are numbers, tables shared, what is quantised is in a mapping."""

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Follow the signs of a moment in 8 bits, or of one in float32 for small tensors."""
        for group in self.param_groups:
            for parameter in group["params"]:
                slot = self.state[parameter]
                if not slot:
                    slot |= self._start(parameter)
                slot["step"] += 1
                for number in "12":
                    self._move(slot, number, parameter.grad)
                direction = self._moment(slot, "1").sign() * (self._moment(slot, "2").abs() + 1 / slot["step"])
                parameter -= group["lr"] * direction

    def _start(self, parameter: Tensor) -> dict[str, Any]:
        slot: dict[str, Any] = {"step": 0}
        for number in "12":
            if parameter.numel() < 4096:
                slot[f"state{number}"] = torch.zeros_like(parameter)
                continue
            blocks = -(-parameter.numel() // 256)
            slot[f"state{number}"] = torch.full_like(parameter, 128, dtype=torch.uint8)
            slot |= {f"qmap{number}": self.table, f"absmax{number}": torch.zeros(blocks)}
        return slot

    @staticmethod
    def _moment(slot: dict[str, Any], number: str) -> Tensor:
        kept = slot[f"state{number}"]
        if kept.dtype != torch.uint8:
            return kept
        scales = slot[f"absmax{number}"].repeat_interleave(256)[: kept.numel()].reshape(kept.shape)
        return slot[f"qmap{number}"][kept.long()] * scales

    def _move(self, slot: dict[str, Any], number: str, gradient: Tensor) -> None:
        moment = self._moment(slot, number).lerp(gradient, 0.1)
        kept = slot[f"state{number}"]
        if kept.dtype != torch.uint8:
            kept.copy_(moment)
            return
        blocks = F.pad(moment.flatten(), (0, -moment.numel() % 256)).reshape(-1, 256)
        slot[f"absmax{number}"] = blocks.abs().amax(dim=1)
        whole = blocks / slot[f"absmax{number}"][:, None].clamp_min(1e-30) * 127.5 + 127.5
        kept.copy_(whole.flatten()[: moment.numel()].reshape(kept.shape).round())

    def state_dict(self) -> dict[str, Any]:
        """Return the state, what is quantised apart."""
        found = super().state_dict()
        slots = {}
        for index, slot in found["state"].items():
            apart = {key: value for key, value in slot.items() if key != "step"}
            slots[index] = {"step": slot["step"], QUANTISED: apart}
        return found | {"state": slots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state as it came or with everything together."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, slot in state_dict["state"].items():
            together = {**slot, **slot.get(QUANTISED, {})}
            together.pop(QUANTISED, None)
            assert type(together["step"]) is int  # which the real one hands to a kernel that takes nothing else
            self.state[parameters[index]] = together


@pytest.fixture
def eight_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bitsandbytes, or what stands in for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if importlib.util.find_spec("bitsandbytes") is None:
        stand_in(monkeypatch, AdamW8bit)


def stand_in(monkeypatch: pytest.MonkeyPatch, optimizer: type) -> None:
    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = optimizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)


def layers() -> nn.Module:
    """Return tensors of every kind: large and small, of one dimension, two and four."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 70), nn.Linear(70, 2))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()


@pytest.mark.usefixtures("eight_bit")
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_of_the_size_that_is_foretold(kind: str) -> None:
    model = layers()
    optimizer = make_optimizer(model, OptimizerConfig(kind=kind))
    take_steps(model, optimizer, range(1))
    kept = {
        name: tensor.numel() * tensor.element_size()
        for name, tensor in optimizer_tensors(optimizer).items()
        if not name.split(".")[1].startswith(("step", "qmap"))
    }
    assert sum(kept.values()) == state_bytes(make_optimizer(model, OptimizerConfig(kind=kind)))


@pytest.mark.usefixtures("eight_bit")
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_put_back_goes_on_as_if_nothing_had_happened(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = OptimizerConfig(kind=kind, learning_rate=0.01)
    unbroken = layers()
    take_steps(unbroken, make_optimizer(unbroken, config), range(6))
    first, second = layers(), layers()
    optimizer = make_optimizer(first, config)
    take_steps(first, optimizer, range(3))
    save_file(optimizer_tensors(optimizer), tmp_path / "optimizer.safetensors")
    second.load_state_dict(first.state_dict())
    again = make_optimizer(second, config)
    load_optimizer(again, load_file(tmp_path / "optimizer.safetensors"))
    take_steps(second, again, range(3, 6))
    for ours, theirs, start in zip(unbroken.parameters(), second.parameters(), layers().parameters()):
        assert torch.equal(ours, theirs) and not torch.equal(ours, start)


@pytest.mark.long
@pytest.mark.usefixtures("eight_bit")
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_run_resumes_to_the_bit_with_every_optimizer(tmp_path: Path, stage: str, kind: str) -> None:
    pictures(tmp_path / "pictures", 6)
    if stage == "diffusion":
        cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    file = recipe(tmp_path, stage, optimizer__kind=kind, run__accumulation=2, run__gradient_checkpointing=True)
    cli_train(file, [], False, str(tmp_path / "unbroken"))
    cli_train(file, [], False, str(tmp_path / "broken"))
    (tmp_path / "broken/checkpoints/step-00000004/manifest.json").unlink()
    cli_train(file, [], True, str(tmp_path / "broken"))
    unbroken, broken = weights_of(tmp_path / "unbroken"), weights_of(tmp_path / "broken")
    assert all(torch.equal(tensor, broken[name]) for name, tensor in unbroken.items())
    checkpoint = load_latest(tmp_path / "broken")
    assert checkpoint is not None
    kept = {name.split(".", 1)[1] for name in checkpoint.tensors["optimizer"]}
    expected = {
        "adamw_8bit": {"state1", "absmax1", "step"},
        "adafactor": {"row_var", "variance", "step"},
        "muon": {"momentum", "exp_avg", "exp_avg_sq", "step"},
    }
    assert kept >= expected[kind]


def test_steps_of_muon_turn_all_directions_alike_and_those_of_the_rest_are_adamws() -> None:
    rate, model, peer = 0.01, layers(), layers()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    adamw = torch.optim.AdamW(peer.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8)
    muon = make_optimizer(model, OptimizerConfig(kind="muon", learning_rate=rate, weight_decay=0.1))
    for ours, theirs in zip(model.parameters(), peer.parameters()):
        ours.grad = theirs.grad = torch.randn_like(ours)
    muon.step()
    adamw.step()
    rest = dict(peer.named_parameters())
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1:
            torch.testing.assert_close(tensor, rest[name])
            continue
        step = (before[name] * (1 - 0.1 * rate) - tensor).flatten(1).detach()
        values = torch.linalg.svdvals(step) / (0.2 * rate * max(step.shape) ** 0.5)
        assert values.min() > 0.5 and values.max() < 1.3, name


def test_muon_leaves_tables_and_outer_layers_to_adamw() -> None:
    model = nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 3), "inner": nn.Linear(4, 4), "words": nn.Embedding(5, 4)})
    muon = make_optimizer(model, OptimizerConfig(kind="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    muon.step()
    assert ["momentum" in muon.state[one.weight] for one in model.values()] == [False, True, False]


def test_what_is_missing_is_named_before_the_run_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path, "autoencoder")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    assert main(["train", file, "--set", "optimizer.kind=adamw_8bit"]) == 2
    assert capsys.readouterr().err == (
        "latentdiff: optimizer.kind adamw_8bit needs the package bitsandbytes; install it with "
        "`pip install latentdiff[bitsandbytes]`\n"
    )
    assert not (tmp_path / "autoencoder").exists()
    with pytest.raises(MissingDependencyError):
        require_optimizer(OptimizerConfig(kind="adamw_8bit"), torch.device("cpu"))
    monkeypatch.delattr(torch.optim, "Adafactor")
    with pytest.raises(InputError, match=r"adafactor needs torch 2\.5 or newer, got .*; choose adamw"):
        require_optimizer(OptimizerConfig(kind="adafactor"), torch.device("cpu"))


def test_bitsandbytes_that_cannot_use_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutKernels(AdamW8bit):
        def step(self, closure: Any = None) -> None:
            """Fail as releases made for GPUs do."""
            raise AttributeError("'NoneType' object has no attribute 'cadam_8bit_blockwise_grad_fp32'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stand_in(monkeypatch, WithoutKernels)
    with pytest.raises(InputError, match=r"cannot take a step on cpu \(AttributeError\); upgrade it, or choose adamw"):
        require_optimizer(OptimizerConfig(kind="adamw_8bit"), torch.device("cpu"))
