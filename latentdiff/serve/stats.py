"""Figures of a scheduler: how long jobs wait, how full its calls of the U-Net are."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Recorder", "Stats"]

REMEMBERED = 1000  # newest values that medians are of


@dataclass(frozen=True)
class Stats:
    """How a scheduler is doing.

    Attributes:
        waiting: jobs with images that are not drawn yet.
        running: images that are being drawn.
        decoding: images that are sampled, and not yet decoded.
        pictures: images that were drawn.
        done, failed, cancelled, rejected: jobs that ended so, or found the queue full.
        withheld: pictures that the content filter refused, or failed on.
        steps: common steps that were taken.
        batch_fill: share of the places that were taken, on average over those steps.
        step_seconds: a common step took, in the median of the newest ones.
        admissions: jobs that came to their first step.
        admission_sum: seconds that they waited for it from their submission, all together.
        admission_seconds: median and 95th percentile of that, of the newest ones.
    """

    waiting: int
    running: int
    decoding: int
    pictures: int
    done: int
    failed: int
    cancelled: int
    rejected: int
    withheld: int
    steps: int
    batch_fill: float
    step_seconds: float
    admissions: int
    admission_sum: float
    admission_seconds: tuple[float, float]


class Recorder:
    """Collects the figures, from any thread.

    Args:
        places: how many images are drawn at once at most.
    """

    def __init__(self, places: int) -> None:
        self._places, self._lock = places, threading.Lock()
        self._counts, self._taken, self._waited = Counter[str](), 0, 0.0
        self._step_seconds, self._admissions = deque[float](maxlen=REMEMBERED), deque[float](maxlen=REMEMBERED)

    def count(self, what: str) -> None:
        """Count a "picture", a "step", a job that is "rejected", a picture that is "withheld", or the end of one."""
        with self._lock:
            self._counts[what] += 1

    def step(self, images: int, seconds: float) -> None:
        """Take down a common step of some images."""
        with self._lock:
            self._counts["step"] += 1
            self._taken += images
            self._step_seconds.append(seconds)

    def admission(self, seconds: float) -> None:
        """Take down how long a job waited for its first step."""
        with self._lock:
            self._counts["admission"] += 1
            self._waited += seconds
            self._admissions.append(seconds)

    def stats(self, waiting: int, running: int, decoding: int) -> Stats:
        """Return the figures."""
        with self._lock:
            counts, steps = self._counts, self._counts["step"]
            return Stats(
                waiting=waiting,
                running=running,
                decoding=decoding,
                pictures=counts["picture"],
                done=counts["done"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
                rejected=counts["rejected"],
                withheld=counts["withheld"],
                steps=steps,
                batch_fill=self._taken / (steps * self._places) if steps else 0.0,
                step_seconds=_share(self._step_seconds, 0.5),
                admissions=counts["admission"],
                admission_sum=self._waited,
                admission_seconds=(_share(self._admissions, 0.5), _share(self._admissions, 0.95)),
            )


def _share(values: Sequence[float], share: float) -> float:
    """Return the value that a share of all are below; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0
