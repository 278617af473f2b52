"""Networks as CUDA graphs, with a recorder that computes again what was called: the real one is tested on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.engine import recorded
from latentdiff.engine.recorded import KEPT, Recorded, Recordings
from latentdiff.pipeline import Pipeline

Seconds = Callable[[Callable[[], object], torch.device], float]


class Fake:
    """Records calls as a GPU does: a replay reads and writes the tensors of the call that was recorded."""

    def __init__(self, apart: float = 0.0) -> None:
        self.recorded, self.replayed, self.apart = 0, 0, apart

    def __call__(self, call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        output = call()

        def replay() -> None:
            self.replayed += 1
            output.copy_(call() + self.apart)

        return replay, output


class Sum(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors).sum(dim=0)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each measurement takes, first those of the plain calls, then those of the replays."""
    seconds = [2.0] * recorded.ROUNDS + [1.0] * recorded.ROUNDS
    given = list[float]()

    def timed(call: Callable[[], object], device: torch.device) -> float:
        given[:] = given or seconds
        return given.pop(0)

    monkeypatch.setattr(recorded, "timed", timed)
    return seconds


def test_each_shape_is_recorded_once_and_reads_what_is_given(faster: list[float]) -> None:
    fake = Fake()
    network = Recordings(Sum(), fake)
    texts = torch.ones(2)
    for sample in (torch.zeros(2), torch.full((2,), 3.0)):
        assert network(sample, texts).tolist() == (sample + 1).tolist()
    assert network(torch.zeros(3), torch.zeros(3)).tolist() == [0.0] * 3
    assert fake.recorded == 2
    texts += 1  # the same tensor with other numbers
    first, second = network(torch.zeros(2), texts), network(torch.ones(2), texts)
    assert (first.tolist(), second.tolist()) == ([2.0, 2.0], [3.0, 3.0])
    assert fake.recorded == 2


def test_what_is_no_gain_runs_as_it_is(faster: list[float]) -> None:
    faster[recorded.ROUNDS :] = [1.99] * recorded.ROUNDS
    fake = Fake()
    network = Recordings(Sum(), fake)
    network(torch.zeros(2))
    replayed = fake.replayed
    assert network(torch.ones(2)).tolist() == [1.0, 1.0]
    assert (fake.recorded, fake.replayed) == (1, replayed)


def test_what_computes_something_else_runs_as_it_is(faster: list[float]) -> None:
    network = Recordings(Sum(), Fake(apart=1e-6))
    assert network(torch.ones(2)).tolist() == network(torch.ones(2)).tolist() == [1.0, 1.0]


def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once() -> None:
    def short(call: Callable[[], Tensor], device: torch.device) -> Any:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    network = Recordings(Sum(), short)
    with pytest.warns(UserWarning, match=r"inputs of 2x1 runs without a graph: CUDA out of memory. Tried to allocate"):
        network(torch.ones(2, 1))
    assert network(torch.ones(2, 1)).tolist() == [[1.0], [1.0]]


def test_of_many_shapes_the_last_are_kept(faster: list[float]) -> None:
    fake = Fake()
    network = Recordings(Sum(), fake)
    for size in (*range(1, KEPT + 1), 1, KEPT + 1):
        network(torch.zeros(size))
    assert fake.recorded == KEPT + 1
    network(torch.zeros(1))
    assert fake.recorded == KEPT + 1
    network(torch.zeros(2))  # which was used longest ago
    assert fake.recorded == KEPT + 2


def test_pictures_are_those_of_eager_and_say_so(pipe: Pipeline, faster: list[float]) -> None:
    fake = Fake()
    graphs = Pipeline(pipe.components, engine=Recorded(fake))
    shared: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    for seed in (0, 1):
        plain, drawn = (one("fox", seed=seed, **shared) for one in (pipe, graphs))
        assert torch.equal(plain.images, drawn.images)
        assert drawn.settings["engine"] == "eager"
    assert fake.recorded == 2 and fake.replayed > 2 * 4  # U-Net and decoder
