"""What the tests of training share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from latentdiff.training.monitor.instruments import Speed

from latentdiff.training import monitor, train_autoencoder, train_diffusion


@pytest.fixture(autouse=True)
def speed_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spend no time on how fast the machine is: as much as ten steps of a tiny network."""
    monkeypatch.setattr(train_diffusion, "measure_speed", lambda *_, **__: Speed(flops=1e9, peak=1e12))


@pytest.fixture(autouse=True)
def activations_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pass of shapes before each run, which is counted where calls are counted."""
    for module in (train_autoencoder, train_diffusion):
        monkeypatch.setattr(module, "kept_by_step", lambda *_, **__: 0)


@pytest.fixture(autouse=True)
def samples_of_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw samples, whose looks no test asks for, in fewer steps than users would."""
    monkeypatch.setattr(monitor.samples, "Settings", SimpleNamespace(num_inference_steps=3))
