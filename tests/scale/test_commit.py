"""Commits: killed before any operation on files, a job ends as one that was left alone, every row exactly once."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from latentdiff.scale.manifest import read_manifest, shards_in
from latentdiff.scale.store import LocalStore
from tests.scale.small import contents, die_at, in_a_fork, run_here, small_job, use_scribe, write_table

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
OTHERS = ("parquet", "files")
ROWS: list[dict[str, Any]] = [{"prompt": f"picture {number}"} for number in range(3)]
CHANGED = [{"prompt": "bad"}, *ROWS[1:], ROWS[1], {"prompt": "last"}]


@pytest.mark.parametrize("form", ["webdataset", *(pytest.param(f, marks=pytest.mark.long) for f in OTHERS)])
def test_killed_at_every_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Of a job, and of the same one with another table after it, which takes pictures over and puts shards aside."""
    drawn = use_scribe(monkeypatch)
    one, other = (write_table(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", ROWS), ("b", CHANGED)))
    first, whole = tmp_path / "first", tmp_path / "whole"
    run_here(one, first, small_job(format=form))
    shutil.copytree(first, whole)
    drawn.clear()
    summary = run_here(other, whole)
    assert drawn == ["bad", "last"] and (summary.drawn, summary.taken, summary.failed) == (1, 3, 1)
    for table, begun, expected in ((one, None, contents(first)), (other, first, contents(whole))):
        boundary, ended = 0, 1
        while ended:
            boundary += 1
            out = tmp_path / f"{form}-{boundary}"
            if begun is not None:
                shutil.copytree(begun, out)

            def act(table: str = table, out: Path = out, boundary: int = boundary) -> None:
                die_at(boundary)
                run_here(table, out, small_job(format=form))

            ended = in_a_fork(act)
            assert ended in (0, -signal.SIGKILL)
            run_here(table, out, small_job(format=form))
            assert contents(out) == expected, f"killed before operation {boundary}"
            assert not any((out / ".tmp").iterdir())
            shutil.rmtree(out)
        assert boundary > 15


def test_every_row_is_in_the_manifests_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_scribe(monkeypatch)
    run_here(write_table(tmp_path / "rows.jsonl", CHANGED), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    manifests = [read_manifest(store, shard) for shard in sorted(shards_in(store))]
    entries = [entry for manifest in manifests if manifest for entry in manifest.entries]
    assert [entry["row"] for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0]["failed"] == "it is bad" and "key" not in entries[0]
    assert entries[1]["name"] == entries[3]["name"] and entries[1]["sha256"] == entries[3]["sha256"]
    (failures,) = (tmp_path / "out/failures").iterdir()
    assert json.loads(failures.read_text()) == entries[0]


def test_equal_rows_of_a_shard_are_drawn_once_and_have_keys_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, said = use_scribe(monkeypatch), list[str]()
    table = write_table(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "a"}])
    summary = run_here(table, tmp_path / "out", small_job(shard_size=4, format="files"), said=said)
    assert drawn == ["a", "b"] and summary.drawn == 4
    assert said == ["2 of 4 rows are equal to others and show the same; give them a column seed"]
    store = LocalStore(tmp_path / "out")
    manifest = read_manifest(store, *shards_in(store))
    assert manifest is not None
    keys, name = [entry["key"] for entry in manifest.entries], manifest.entries[0]["name"]
    assert [keys[0], keys[2], keys[3]] == [name, f"{name}-2", f"{name}-3"]


@pytest.mark.parametrize("damage", ["head", "row", "cut", "name"])
def test_a_manifest_that_is_not_as_it_was_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    use_scribe(monkeypatch)
    run_here(write_table(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out")
    store = LocalStore(tmp_path / "out")
    (shard,) = shards_in(store)
    file = tmp_path / f"out/manifests/{shard}.jsonl"
    text = file.read_text()
    changed = {
        "head": text.replace('"sha256":"', '"sha256":"0', 1),
        "row": text.replace('"row":1', '"row":2'),
        "cut": text[:-5],
        "name": text.replace(shard, "00000009-aa", 1),
    }
    assert read_manifest(store, shard) is not None
    file.write_text(changed[damage])
    assert read_manifest(store, shard) is None
