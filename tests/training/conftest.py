"""What the tests of training share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from latentdiff.training.monitor.instruments import Speed

from latentdiff.training import monitor, train_diffusion


@pytest.fixture(autouse=True)
def speed_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spend no time on how fast the machine is: as much as ten steps of a tiny network."""
    monkeypatch.setattr(train_diffusion, "measure_speed", lambda *_, **__: Speed(flops=1e9, peak=1e12))


@pytest.fixture(autouse=True)
def samples_of_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw samples, whose looks no test asks for, in fewer steps than users would."""
    monkeypatch.setattr(monitor.samples, "Settings", SimpleNamespace(num_inference_steps=3))
