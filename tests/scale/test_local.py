"""Processes: one that dies costs the shard in hand, what all die of is given up, and they end with the driver."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import InputError, ModelLoadError, StorageError
from latentdiff.scale import local
from latentdiff.scale.batch import How, run_batch
from latentdiff.scale.commit import Report
from latentdiff.scale.local import Began, draw_locally
from latentdiff.scale.worker import Crew
from tests.scale.small import Scribe, contents, forked_crew, small_job, tasks, write_table

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked here, which takes no time")


class Dying(Scribe):
    """Draws, but is killed by the prompt `deadly`, and by `once` where a file is not there yet."""

    def __init__(self, mark: Path, begins: Any) -> None:
        super().__init__(begins=begins)
        self.mark = mark

    def draw(self, rows: Any) -> Iterator[Any]:
        for row in rows:
            self.begins([row])
            if row.prompt == "deadly" or (row.prompt == "once" and not self.mark.exists()):
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield from Scribe().draw([row])


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    """A crew of `Dying` workers, which are forked."""
    monkeypatch.setattr(Crew, "artist", lambda crew, begins=None: Dying(tmp_path / "mark", begins))
    return forked_crew(tmp_path, monkeypatch)


def test_a_worker_that_dies_costs_the_shard_in_hand(tmp_path: Path, crew: Crew) -> None:
    prompts = ["a", "b", "c", "once", "d"]
    events = list(draw_locally(tasks(tmp_path, prompts), crew, 2))
    reports = [event for event in events if isinstance(event, Report)]
    assert sorted(report.number for report in reports) == [0, 1, 2]
    assert sum(report.drawn for report in reports) == 5 and not any(report.failed for report in reports)
    assert sum(isinstance(event, Began) for event in events) == 7  # the shard in hand was begun again
    assert (tmp_path / "mark").exists()


def test_rows_that_every_worker_dies_of_are_given_up(tmp_path: Path, crew: Crew) -> None:
    reports = [e for e in draw_locally(tasks(tmp_path, ["a", "deadly", "b"]), crew, 1) if isinstance(e, Report)]
    assert [(one.number, one.drawn, one.failed) for one in reports] == [(0, 1, 1), (1, 1, 0)]
    (failures,) = (tmp_path / "out/failures").iterdir()
    assert "5 processes died while they drew it (SIGKILL)" in failures.read_text()


def test_workers_that_die_while_they_load_end_the_run(
    tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Crew, "artist", lambda crew, begins=None: os._exit(7))
    with pytest.raises(StorageError, match=r"3 workers died while they loaded the model \(exit code 7\)"):
        list(draw_locally(tasks(tmp_path, ["a"]), crew, 2))


def test_an_error_of_a_worker_is_the_drivers(tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(crew: Crew, begins: Any = None) -> Any:
        raise ModelLoadError("it is refused")

    monkeypatch.setattr(Crew, "artist", refused)
    with pytest.raises(ModelLoadError, match="it is refused"):
        list(draw_locally(tasks(tmp_path, ["a"]), crew, 2))


def test_all_workers_end_when_the_driver_stops_listening(tmp_path: Path, crew: Crew) -> None:
    events = draw_locally(tasks(tmp_path, list("abcdef")), crew, 2)
    next(events)
    children = local.multiprocessing.active_children()
    assert children
    events.close()  # type: ignore[attr-defined]  # a generator
    assert not local.multiprocessing.active_children()


def test_an_interrupted_run_says_how_far_it_is_and_goes_on(
    tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in "abcdef"])
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    run_batch(table, str(whole), small_job(), How(workers=1))
    real, count = local._Team.heard, 0

    def heard(team: Any, member: Any) -> Iterator[Any]:
        nonlocal count
        for event in real(team, member):
            yield event
            count += isinstance(event, Report)
            if count == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local._Team, "heard", heard)
        with pytest.raises(KeyboardInterrupt, match="interrupted; 2 of 6 rows are done; the same command goes on"):
            run_batch(table, str(out), small_job(), How(workers=1))
    assert not local.multiprocessing.active_children()
    run_batch(table, str(out), small_job(), How(workers=1))
    assert contents(out) == contents(whole)


def test_a_limit_of_failures_ends_all_workers(tmp_path: Path, crew: Crew) -> None:
    table = write_table(tmp_path / "rows.jsonl", [{"prompt": "bad", "seed": number} for number in range(6)])
    with pytest.raises(InputError, match="1 rows may fail, got"):
        run_batch(table, str(tmp_path / "limited"), small_job(), How(workers=2, max_failures=1))
    assert not local.multiprocessing.active_children()
