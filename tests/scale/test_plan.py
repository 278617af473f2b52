"""What is missing: computed from the table and from which manifests are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import InputError
from latentdiff.scale.commit import write_shard
from latentdiff.scale.formats import FORMATS
from latentdiff.scale.plan import Layout, Plan, Task, make_plan, origins, read_shards, retire
from latentdiff.scale.rows import Columns, Maker
from latentdiff.scale.store import LocalStore
from latentdiff.scale.table import Table, open_table
from tests.scale.small import Scribe, write_table

ROWS: list[dict[str, Any]] = [{"prompt": f"picture {number}"} for number in range(7)]


def layout(form: str = "webdataset", size: int = 3) -> Layout:
    return Layout(Maker({"model_hash": "0"}), Columns(), form, size)


def write_all(table: Table, store: LocalStore, form: str = "webdataset", size: int = 3) -> list[str]:
    for shard in read_shards(table, layout(form, size)):
        write_shard(store, form, ("id",), Task(shard), Scribe().draw)
    return sorted(store.list("manifests"))


def plan_of(table: Table, store: LocalStore, form: str = "webdataset", **more: Any) -> Plan:
    return make_plan(table, layout(form), store, **more)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


def test_all_is_missing_and_then_nothing(tmp_path: Path, store: LocalStore) -> None:
    table = open_table(write_table(tmp_path / "rows.jsonl", ROWS))
    before = plan_of(table, store)
    assert (before.rows, before.shards, before.missing) == (7, 3, {0: 3, 1: 3, 2: 1}) and before.missing_rows == 7
    write_all(table, store)
    after = plan_of(table, store)
    assert not after.missing and after.wanted == before.wanted and after.equal == 0


@pytest.mark.parametrize("form", list(FORMATS))
def test_a_row_that_changes_makes_its_shard_missing_and_leaves_the_others(
    tmp_path: Path, store: LocalStore, form: str
) -> None:
    table = open_table(write_table(tmp_path / "rows.jsonl", ROWS))
    write_all(table, store, form)
    write_table(tmp_path / "rows.jsonl", [*ROWS[:4], {"prompt": "another"}, *ROWS[5:]])
    plan = plan_of(table, store, form)
    assert plan.missing == {1: 3}
    shard = list(read_shards(table, layout(form)))[1]
    there = origins(store, plan)
    assert [name in there for name in shard.names] == [True, False, True]
    scribe = Scribe()
    taken = {name: there[name] for name in shard.names if name in there}
    report = write_shard(store, form, ("id",), Task(shard, taken=taken), scribe.draw)
    assert scribe.drawn == ["another"] and (report.drawn, report.taken) == (1, 2)
    assert retire(store, plan) == 1 and retire(store, plan) == 0
    assert len(store.list("shards")) == len(store.list("manifests")) == 3
    assert len(store.list("earlier/shards")) == len(store.list("earlier/manifests")) == 1
    write_table(tmp_path / "rows.jsonl", ROWS)  # as it was: nothing is drawn again
    back = plan_of(table, store, form)
    assert (
        back.missing == {1: 3} and set(list(read_shards(table, layout(form)))[1].names) <= origins(store, back).keys()
    )


def test_a_row_that_is_put_first_moves_pictures_and_draws_none_of_them(tmp_path: Path, store: LocalStore) -> None:
    table = open_table(write_table(tmp_path / "rows.jsonl", ROWS))
    write_all(table, store)
    write_table(tmp_path / "rows.jsonl", [{"prompt": "first"}, *ROWS])
    plan = plan_of(table, store)
    assert plan.missing_rows == 8
    names = [name for shard in read_shards(table, layout()) for name in shard.names]
    assert [name in origins(store, plan) for name in names] == [False] + [True] * 7


def test_pictures_are_found_where_putting_them_aside_was_interrupted(tmp_path: Path, store: LocalStore) -> None:
    table = open_table(write_table(tmp_path / "rows.jsonl", ROWS[:3]))
    write_all(table, store)
    (name,) = store.list("shards")
    store.move(f"shards/{name}", f"earlier/shards/{name}")
    write_table(tmp_path / "rows.jsonl", [{"prompt": "first"}, *ROWS[:2]])
    found = origins(store, plan_of(table, store))
    assert {origin.path for origin in found.values()} == {f"earlier/shards/{name}"} and len(found) == 3


def test_what_is_kept_beside_pictures_counts_for_the_shard(tmp_path: Path, store: LocalStore) -> None:
    table = open_table(write_table(tmp_path / "rows.jsonl", [{"prompt": "a", "id": 1}]))
    write_all(table, store)
    assert not plan_of(table, store).missing
    write_table(tmp_path / "rows.jsonl", [{"prompt": "a", "id": 2}])
    plan = plan_of(table, store)
    assert plan.missing == {0: 1} and len(origins(store, plan)) == 1


def test_a_shard_without_its_data_is_missing(tmp_path: Path, store: LocalStore) -> None:
    table = open_table(write_table(tmp_path / "rows.jsonl", ROWS))
    write_all(table, store)
    data = sorted(store.list("shards"))[1]
    store.remove(f"shards/{data}")
    plan = plan_of(table, store)
    assert plan.missing == {1: 3} and plan.again == {data.removesuffix(".tar")} and not origins(store, plan)


def test_rows_that_failed_are_known_and_tried_again_when_asked(tmp_path: Path, store: LocalStore) -> None:
    table = open_table(write_table(tmp_path / "rows.jsonl", [*ROWS[:3], {"prompt": "bad"}, *ROWS[4:]]))
    write_all(table, store)
    assert not plan_of(table, store).missing and plan_of(table, store).failed == 1
    again = plan_of(table, store, retry_failed=True)
    assert again.missing == {1: 3} and again.failed == 0 and len(origins(store, again)) == 2


def test_equal_rows_are_counted(tmp_path: Path, store: LocalStore) -> None:
    table = open_table(write_table(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}, *[{"prompt": "a"}] * 3]))
    assert plan_of(table, store).equal == 3


def test_an_empty_table_is_refused(tmp_path: Path, store: LocalStore) -> None:
    with pytest.raises(InputError, match="must have a row at least, got none"):
        plan_of(open_table(write_table(tmp_path / "rows.jsonl", [])), store)
