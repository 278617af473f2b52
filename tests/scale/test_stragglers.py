"""Which shards are late, and what becomes of one that a worker hangs at."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentdiff.scale import local, stragglers
from latentdiff.scale.commit import Report, find_damage
from latentdiff.scale.local import draw_locally
from latentdiff.scale.manifest import shards_in
from latentdiff.scale.stragglers import InHand
from latentdiff.scale.worker import Crew
from tests.scale.small import Scribe, forked_crew, tasks


def test_a_shard_is_late_by_what_the_others_took() -> None:
    hand = InHand()
    for number in range(4):
        hand.begin(number, 10, 0.0)
    assert hand.late(10_000.0) is None  # nobody knows what is usual
    hand.end(0, 20.0)
    hand.end(1, 22.0)
    assert hand.late(62.0) is None and hand.late(64.0) in (2, 3)
    hand.begin(4, 100, 30.0)  # a larger one may take longer
    assert hand.late(700.0) in (2, 3)
    first = hand.late(64.0)
    assert first is not None
    hand.begin(first, 10, 64.0)
    assert hand.late(64.0) == ({2, 3} - {first}).pop()  # two workers are enough
    assert not hand.lose(first) and first in hand
    assert hand.lose(first) and first not in hand and len(hand) == 2


def test_nothing_is_late_within_some_seconds() -> None:
    hand = InHand()
    for number in range(2):
        hand.begin(number, 1, 0.0)
    hand.end(0, 0.01)
    assert hand.late(stragglers.LEAST_SECONDS - 1) is None and hand.late(stragglers.LEAST_SECONDS) == 1


class Hanging(Scribe):
    """Draws, but the first to draw the prompt `slow` hangs."""

    def __init__(self, mark: Path, begins: Any) -> None:
        super().__init__(begins=begins)
        self.mark = mark

    def draw(self, rows: Any) -> Iterator[Any]:
        if any(row.prompt == "slow" for row in rows) and not self.mark.exists():
            self.mark.touch()
            time.sleep(600)
        yield from super().draw(rows)


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    """A crew of `Hanging` workers, which are forked."""
    if not hasattr(os, "fork"):
        pytest.skip("workers are forked here, which takes no time")
    monkeypatch.setattr(Crew, "artist", lambda crew, begins=None: Hanging(tmp_path / "mark", begins))
    monkeypatch.setattr(stragglers, "LEAST_SECONDS", 0.5)
    monkeypatch.setattr(local, "PAUSE", 0.05)
    return forked_crew(tmp_path, monkeypatch)


def test_a_shard_that_a_worker_hangs_at_is_drawn_by_another(tmp_path: Path, crew: Crew) -> None:
    events = list(draw_locally(tasks(tmp_path, ["a", "slow", "b", "c", "d", "e", "f"]), crew, 2))
    reports = [event for event in events if isinstance(event, Report)]
    assert sorted(report.number for report in reports) == [0, 1, 2, 3]
    assert sum(report.drawn for report in reports) == 7
    assert not local.multiprocessing.active_children()  # nor the one that hung
    assert len(shards_in(crew.store)) == 4 and not any(find_damage(crew.store, one) for one in shards_in(crew.store))


def test_a_shard_that_both_wrote_differently_is_written_again(
    tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow worker replaces the files just before it is ended."""
    real, seen = local.find_damage, list[str]()

    def overwritten(store: Any, shard: str) -> str | None:
        if not seen:
            seen.append(shard)
            for file in (tmp_path / "out/shards" / shard).iterdir():
                file.write_bytes(b"rounded otherwise")
        return real(store, shard)

    monkeypatch.setattr(local, "find_damage", overwritten)
    events = list(draw_locally(tasks(tmp_path, ["a", "slow", "b", "c", "d"]), crew, 2))
    assert sum(event.drawn for event in events if isinstance(event, Report)) == 5
    assert seen and real(crew.store, seen[0]) is None
