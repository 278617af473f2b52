"""The pretended device itself: what it refuses, what it counts, and that training and autocast run on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.fake_device import FakeDevice

KINDS = ("cuda", "mps")


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Any:
    with FakeDevice(request.param) as device:
        yield device


def test_it_is_there_inside_the_block_alone() -> None:
    there = torch.cuda.is_available()
    with FakeDevice("cuda") as device:
        assert torch.cuda.is_available() and not torch.backends.mps.is_available()
        assert torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
        assert torch.cuda.get_device_properties(device.device).total_memory == device.memory
        with pytest.raises(RuntimeError, match="ordinal"):
            torch.zeros(1, device="cuda:1")
    assert torch.cuda.is_available() == there
    with FakeDevice("mps"):
        assert torch.backends.mps.is_available() and not torch.cuda.is_available()


def test_the_device_stays_with_what_is_made_of_a_tensor(device: FakeDevice) -> None:
    x = torch.ones(2, 3, device=device.kind)
    assert x.device == device.device == torch.empty_like(x).device == x.new_zeros(1).device
    network = nn.Linear(3, 2).to(device.device)
    assert network.weight.device == device.device
    others = [x[0], x.T, x + 1, x.sum(), x.detach(), x.data, *x.unbind(), copy.deepcopy(network).weight, network(x)]
    assert {other.device for other in others} == {device.device}
    network(x).sum().backward()
    assert network.weight.grad is not None and network.weight.grad.device == device.device
    assert x.cpu().device == x.to("cpu").device == torch.zeros(1).device == torch.device("cpu")
    home = torch.ones(2)
    assert home.to(x).device == device.device and home.device == torch.device("cpu")
    assert not device.holds(home)


REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda x, y: x + y,
    "join": lambda x, y: torch.cat([x, y]),
    "join of one number": lambda x, y: torch.stack([x[0, 0], y[0, 0]]),
    "product": lambda x, y: F.linear(x, y),
    "in place": lambda x, y: y.add_(x),
    "index": lambda x, y: y[x.long()],
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_two_devices_do_not_mix(device: FakeDevice, name: str) -> None:
    with pytest.raises(RuntimeError, match=r"on one device|on the CPU"):
        REFUSED[name](torch.zeros(2, 2, device=device.device), torch.zeros(2, 2))


def test_numbers_of_the_cpu_may_be_used_and_copied(device: FakeDevice) -> None:
    x = torch.zeros(3, device=device.device)
    assert (x + torch.tensor(2.0)).tolist() == [2, 2, 2]
    x[:2] = torch.ones(2)
    x.copy_(torch.arange(3.0))
    assert len(device.copies) == 2 and x.tolist() == [0, 1, 2]


def test_numpy_and_random_numbers_of_the_cpu_are_refused(device: FakeDevice) -> None:
    x = torch.zeros(2, device=device.device)
    for convert in (Tensor.numpy, np.asarray):
        with pytest.raises(TypeError, match="to numpy"):
            convert(x)
    generator = torch.Generator().manual_seed(0)
    for draw in (lambda: torch.randn(2, generator=generator, device=x.device), lambda: x.normal_(generator=generator)):
        with pytest.raises(RuntimeError, match="generator but found 'cpu'"):
            draw()
    assert torch.randn(2, generator=generator).to(x).device == x.device


def test_float64_is_not_for_mps() -> None:
    asked: list[Callable[[], Tensor]] = [
        lambda: torch.ones(1, device=device.device).double(),
        lambda: torch.ones(1, dtype=torch.float64).to(device.device),
        lambda: torch.ones(1, dtype=torch.float64, device=device.device),
        lambda: torch.ones(1, device=device.device).sum(dtype=torch.float64),
    ]
    with FakeDevice("cuda") as device:
        assert all(ask().dtype == torch.float64 for ask in asked)
    with FakeDevice("mps") as device:
        for ask in asked:
            with pytest.raises(TypeError, match="float64"):
                ask()
        assert torch.ones(1, dtype=torch.float64).to(device.device, torch.float32).device == device.device


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "truth": lambda x: bool(x[0]),
    "list": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "written mask": lambda x: x.__setitem__(x > 0, torch.zeros(3, device=x.device)),
    "number as index": lambda x: torch.zeros(3, device=x.device)[x[0].long()],
    "copy": lambda x: torch.zeros(3).copy_(x),
    "print": lambda x: str(x),
    "repeats": lambda x: x.repeat_interleave(x.long()),
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 1).sum(),
    "filled mask": lambda x: x.__setitem__(x > 0, 0.0),
    "places": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "cast": lambda x: x.to(torch.float16),
}


@pytest.mark.parametrize("name", [*WAITS, *FREE])
def test_what_waits_for_the_device_is_counted_by_line(device: FakeDevice, name: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], device=device.device)
    device.forget()
    {**WAITS, **FREE}[name](x)
    assert sum(device.syncs.values()) == (name in WAITS)
    assert all("tests/test_fake_device.py:" in line for line in device.syncs)
    assert not device.copies


def test_what_is_sent_to_the_device_is_counted(device: FakeDevice) -> None:
    x = torch.tensor([1.0, 2.0], device=device.device)
    x.new_tensor([1])
    torch.as_tensor(np.zeros(2), dtype=torch.float32, device=device.device)
    x[torch.tensor([0, 1])]
    torch.ones(2).to(x.device)
    assert sum(device.copies.values()) == 5 and not device.syncs
    x.to(device.kind)
    torch.zeros(2, device=device.device)
    assert sum(device.copies.values()) == 5


def test_copies_that_do_not_wait() -> None:
    for kind in KINDS:
        with FakeDevice(kind) as device:
            with pytest.raises(RuntimeError, match="before it is there"):
                torch.ones(1, device=device.device).to("cpu", non_blocking=True)
            for pinned in (torch.ones(1).pin_memory(), torch.empty(1, pin_memory=True)):
                assert pinned.is_pinned() and pinned.to(device.device, non_blocking=True).device == device.device
    with FakeDevice("mps") as device, pytest.raises(RuntimeError, match="may read freed memory"):
        torch.ones(1).to(device.device, non_blocking=True)
    with FakeDevice("cuda") as device:
        assert torch.ones(1).to(device.device, non_blocking=True).device == device.device


def test_threads_are_inside_too(device: FakeDevice) -> None:
    made: list[Tensor] = []
    thread = Thread(target=lambda: made.append(torch.zeros(1, device=device.kind) + 1))
    thread.start()
    thread.join()
    assert made[0].device == device.device


def _train(place: str, autocast: bool = False, optimizer: type[Any] = torch.optim.AdamW) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)).to(place)
        inputs = torch.randn(5, 4).to(place)
    average = copy.deepcopy(network)
    learner = optimizer(network.parameters(), lr=0.01)
    for _ in range(3):
        with torch.autocast(place, torch.bfloat16, enabled=autocast):
            loss = checkpoint(network, inputs, use_reentrant=False).float().square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        assert norm.device.type == place
        learner.step()
        learner.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 0.5)
    assert {parameter.device.type for parameter in average.parameters()} == {place}
    return [parameter.detach().cpu() for parameter in average.parameters()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_gives_what_it_gives_on_the_cpu(device: FakeDevice, autocast: bool, optimizer: type[Any]) -> None:
    drawn = _train(device.kind, autocast, optimizer)
    assert not {line for line in device.syncs if not line.startswith("to ")}
    for ours, theirs in zip(drawn, _train("cpu", autocast, optimizer)):
        torch.testing.assert_close(ours, theirs)
