"""The actor that gives out shards: each once, again where a worker was lost, twice where one is late."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import InputError
from latentdiff.scale.commit import Report
from latentdiff.scale.plan import Layout, Task, read_shards
from latentdiff.scale.rows import Columns, Maker
from latentdiff.scale.source import END, SKIP, WAIT, Failed, Source
from latentdiff.scale.table import open_table
from tests.scale.small import write_table

SPARE, OTHER_SPARE = 5, 6  # places after the last task


class Tasks:
    """Gives five tasks of two rows, and counts how often it is asked."""

    def __init__(self, table: str) -> None:
        self.table, self.made, self.now = table, 0, 0.0

    def __call__(self) -> Iterator[Task]:
        self.made += 1
        yield from map(Task, read_shards(open_table(self.table), Layout(Maker({"model_hash": "0"}), Columns(), "x", 2)))

    def source(self, written: Callable[[], set[str]] = set) -> Source:
        return Source(self, os.getcwd(), 5, written, lambda: self.now)


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(write_table(tmp_path / "rows.jsonl", [{"prompt": f"{number}"} for number in range(10)]))


def number(answer: Any) -> int:
    assert isinstance(answer, Task), answer
    return answer.shard.number


def write(source: Source, place: int, shard: int) -> None:
    source.done(place, Report(shard, 2, 0, 0))


def test_tasks_are_given_out_by_number_and_read_once(tasks: Tasks) -> None:
    source, order = tasks.source(), [1, 0, 3, 2, 4]
    assert [number(source.get(place)) for place in order] == order
    assert number(source.get(3)) == 3 and tasks.made == 1  # its worker was lost
    for place in order:
        write(source, place, place)
    assert not source._held and sorted(report.number for report in source.reports()) == [0, 1, 2, 3, 4]
    assert source.get(1) == SKIP  # whoever lost its worker just after it had written
    assert source.get(SPARE) == END and not source.doubled()


def test_rows_that_every_worker_dies_of_are_given_up(tasks: Tasks) -> None:
    source = tasks.source()
    for _ in range(5):
        task = source.get(0)
        assert isinstance(task, Task) and not task.given_up
        source.began(0, ((2, 0),))
    task = source.get(0)
    assert isinstance(task, Task) and list(task.given_up) == [task.shard.names[1]]


def test_an_error_of_the_table_goes_to_the_driver() -> None:
    def refused() -> Iterator[Task]:
        raise InputError("it has changed")
        yield

    assert Source(refused, os.getcwd(), 1, set).get(0) == Failed("InputError", "it has changed")


def test_what_nobody_has_begun_is_drawn_by_whoever_is_free(tasks: Tasks) -> None:
    """As when a place waits behind another in a worker that hangs."""
    source = tasks.source()
    assert [number(source.get(place)) for place in (0, 2)] == [0, 2]
    assert number(source.get(SPARE)) == 1
    assert source.get(1) == SKIP
    assert number(source.get(SPARE)) == 1  # the one that took it was lost
    write(source, SPARE, 1)
    assert number(source.get(SPARE)) == 3 and number(source.get(OTHER_SPARE)) == 4
    for place, shard in ((SPARE, 3), (OTHER_SPARE, 4), (0, 0)):
        write(source, place, shard)
    assert source.get(SPARE) == WAIT
    write(source, 2, 2)
    assert source.get(SPARE) == END and len(source.reports()) == 5


def test_a_task_that_is_late_is_given_to_a_second_worker(tasks: Tasks) -> None:
    source = tasks.source()
    for place in range(5):
        source.get(place)
    tasks.now = 10.0
    for place in range(4):
        write(source, place, place)
    assert source.get(SPARE) == WAIT
    tasks.now = 31.0
    assert number(source.get(SPARE)) == 4 and source.get(OTHER_SPARE) == WAIT
    write(source, SPARE, 4)
    write(source, 4, 4)  # the slow one comes in after all
    assert len(source.reports()) == 5 and len(source.doubled()) == 1


def test_an_actor_that_was_lost_finds_in_the_store_what_is_left(tasks: Tasks) -> None:
    names = [task.shard.name for task in tasks()]
    source = tasks.source(lambda: {names[0], names[1], names[3]})
    write(source, 2, 2)  # of a worker that the actor before it gave a task
    assert number(source.get(SPARE)) == 4
    write(source, SPARE, 4)
    assert source.get(SPARE) == END
