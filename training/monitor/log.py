"""The log of a run: a progress bar, and scalars and pictures for its trackers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..config import RunConfig
from .instruments import Speed
from .trackers import open_trackers


class Log:
    """The trackers of a run and a progress bar; averages what it is given between two lines of the log.

    Only the main process writes.
    """

    def __init__(
        self, config: RunConfig, first_step: int, label: str, accelerator: Accelerator, speed: Speed | None = None
    ) -> None:
        self.speed = speed
        self.every, self.batch_size, main = config.log_every, config.batch_size, accelerator.is_main_process
        self.trackers = open_trackers(config, first_step) if main else []
        total, hidden = config.steps, not main
        self.bar = tqdm(total=total, initial=first_step, desc=label, unit="step", mininterval=5, disable=hidden)
        self.sums: dict[str, Tensor] = {}
        self.count, self.since = 0, time.perf_counter()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Add the values of one step (0-based)."""
        self.bar.update()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())) + torch.as_tensor(value).detach().float().cpu()
        self.count += 1
        if (step + 1) % self.every == 0:
            means = {name: (total / self.count).item() for name, total in self.sums.items()}
            seconds = time.perf_counter() - self.since  # drawing and saving included
            rate = self.count * self.batch_size / seconds
            speed = {} if self.speed is None else self.speed.scalars(rate)
            self.write(step + 1, {**means, "images_per_second": rate, **speed})
            self.bar.set_postfix_str(" ".join(f"{name} {value:.4g}" for name, value in means.items()), refresh=False)
            self.sums, self.count, self.since = {}, 0, time.perf_counter()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars at once."""
        for tracker in self.trackers:
            tracker.scalars(step, scalars)

    def image(self, step: int, file: Path) -> None:
        """Write a sample grid at once."""
        for tracker in self.trackers:
            tracker.image(step, "samples", file)

    def close(self) -> None:
        """Flush and close."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
