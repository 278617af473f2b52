"""What decoded pictures take at once: no more than the budget, in threads and processes, and nobody waits forever."""

from __future__ import annotations

import io
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from latentdiff.training.data import budget, image_info
from latentdiff.training.data.budget import BYTES_PER_PIXEL, UNIT, UNITS, Budget, room_for
from latentdiff.training.data.image_info import decoded
from latentdiff.training.data.prefetch import prefetched_by_workers
from PIL import Image

MOST = UNIT * UNITS


def test_no_more_is_held_than_there_is_and_everybody_gets_it() -> None:
    shared, lock = Budget(), threading.Lock()
    held = [0, 0]  # now, and at most

    def take(size: int) -> None:
        with shared.held(size):
            with lock:
                held[0] += min(size, MOST)
                held[1] = max(held)
            time.sleep(0.002)
            with lock:
                held[0] -= min(size, MOST)

    sizes = [*np.random.default_rng(0).integers(0, MOST // 2, 60).tolist(), MOST, 3 * MOST, 0]
    threads = [threading.Thread(target=take, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    assert MOST // 2 < held[1] <= MOST
    with pytest.raises(KeyError), shared.held(MOST):
        raise KeyError
    with shared.held(MOST):  # which was given back
        pass


def test_a_picture_holds_what_it_takes_while_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(image_info, "room_for", lambda size: asked.append(size) or room_for(size))
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, format="PNG")
    with decoded(stream.getvalue(), "x") as (_, image):
        assert image.size == (30, 20)
    assert asked == [(30, 20)]
    assert BYTES_PER_PIXEL * 2**26 <= MOST  # of the largest picture


class Large:
    """Hold most of the budget and write down when."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, number: int) -> tuple[float, float]:
        with room_for((1, MOST // BYTES_PER_PIXEL)):
            start = time.monotonic()
            time.sleep(0.05)
            return start, time.monotonic()


@pytest.mark.parametrize("processes", [0, 2])
def test_processes_share_the_budget(tmp_path: Path, processes: int) -> None:
    times = sorted(prefetched_by_workers(Large(tmp_path), range(6), processes))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))
    assert budget._budget.free._value == UNITS  # type: ignore[attr-defined]  # that of this process was left alone
