"""What the tests of training share."""

from __future__ import annotations

import pytest
from latentdiff.training.monitor.instruments import Speed

from latentdiff.training import train_diffusion


@pytest.fixture(autouse=True)
def speed_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spend no time on how fast the machine is: as much as ten steps of a tiny network."""
    monkeypatch.setattr(train_diffusion, "measure_speed", lambda *_, **__: Speed(flops=1e9, peak=1e12))
