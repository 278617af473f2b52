"""A model whose calls of the U-Net are counted, and wait until they are let through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from latentdiff import Pipeline
from latentdiff.models.lora import share_weights


class Gate:
    """The model of a pipeline behind a gate.

    Attributes:
        pipe: to be served.
        rows: of every call that was let through.
        shut: called with the input of each call, where it is to be refused.
    """

    def __init__(self, pipe: Pipeline) -> None:
        unet = share_weights(pipe.unet)
        self.pipe = Pipeline(replace(pipe.components, unet=unet))
        self.rows = list[int]()
        self.refuse: Callable[[Tensor], None] = lambda sample: None
        self._permits, self._open, self._waiting = threading.Semaphore(0), False, threading.Semaphore(0)
        predict = unet._predict

        def gated(sample: Tensor, *inputs: Any) -> Tensor:
            self._waiting.release()
            if not self._open:
                assert self._permits.acquire(timeout=30)
            self.rows.append(len(sample))
            self.refuse(sample)
            return predict(sample, *inputs)

        unet._predict = gated  # type: ignore[method-assign]

    def let(self, calls: int) -> None:
        """Let some calls through, and wait until the next one stands at the gate."""
        for _ in range(calls):
            self._permits.release()
            assert self._waiting.acquire(timeout=30)

    def arrive(self) -> None:
        """Wait until a first call stands at the gate."""
        assert self._waiting.acquire(timeout=30)

    def open(self) -> None:
        """Let all calls through from now on."""
        self._open = True
        self._permits.release()


def eventually(true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + 180  # machines are shared
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)
