"""Whole jobs: resumed, changed, refused, of many workers, on other stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import InputError, StorageError
from latentdiff.pipeline import Pipeline
from latentdiff.scale import batch
from latentdiff.scale.batch import How, run_batch
from latentdiff.scale.formats import FORMATS
from latentdiff.scale.job import Job
from latentdiff.scale.model import Model
from latentdiff.scale.store import RemoteStore, open_store
from tests.scale.small import contents, run_here, small_job, use_pipe, use_scribe, write_table

ROWS: list[dict[str, Any]] = [{"prompt": f"picture {number}", "seed": number} for number in range(6)]


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write_table(tmp_path / "rows.jsonl", ROWS)


def test_a_second_run_draws_nothing(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = use_scribe(monkeypatch)
    first = run_here(table, tmp_path / "out")
    before = contents(tmp_path / "out", ())
    assert (first.rows, first.shards, first.drawn, len(drawn)) == (6, 3, 6, 6)
    second = run_here(table, tmp_path / "out")
    assert (second.drawn, second.taken, second.retired, len(drawn)) == (0, 0, 0, 6)
    assert contents(tmp_path / "out", ()) == before


def test_an_object_store_holds_what_a_folder_does(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = use_scribe(monkeypatch)
    run_here(table, tmp_path / "out")
    place = f"memory://{tmp_path.name}/out"
    run_here(table, place)
    store = open_store(place)
    assert isinstance(store, RemoteStore)
    for name in contents(tmp_path / "out"):
        assert store.read(name) == (tmp_path / "out" / name).read_bytes()
    assert len(drawn) == 12 and run_here(table, place).drawn == 0
    write_table(tmp_path / "rows.jsonl", [*ROWS[:5], {"prompt": "last"}])
    summary = run_here(table, place)
    assert (summary.drawn, summary.taken, summary.retired) == (1, 1, 1)
    assert store.list("earlier/manifests") and len(store.list("shards")) == 3


def test_a_store_that_fails_before_a_manifest_leaves_the_shard_missing(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_scribe(monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    place, real, left = (
        f"memory://{tmp_path.name}/out",
        RemoteStore._send,
        5,
    )  # job.json, lock, two files of a shard, one

    def failing(store: RemoteStore, spool: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionError("gone")
        real(store, spool, path)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "_send", failing)
        with pytest.raises(StorageError, match="gone"):
            run_here(table, place)
    store = open_store(place)
    assert len(store.list("manifests")) == 1 and len(store.list("shards")) == 2
    assert run_here(table, place).drawn == 4
    assert len(store.list("manifests")) == len(store.list("shards")) == 3


@pytest.mark.parametrize(
    ("job", "difference"),
    [
        (small_job(settings={"guidance_scale": 3.0}), "guidance_scale was not given, is 3.0"),
        (small_job(shard_size=3), "shard_size was 2, is 3"),
        (small_job(format="files"), "format was 'webdataset', is 'files'"),
        (small_job(mark=False), "mark was True, is False"),
        (small_job(kept=("source",)), "keep was .* is"),
    ],
)
def test_another_job_is_refused_with_the_difference_unless_it_is_new(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job, difference: str
) -> None:
    drawn = use_scribe(monkeypatch)
    run_here(table, tmp_path / "out")
    with pytest.raises(InputError, match=f"is of another job: .*{difference}.*--new"):
        run_here(table, tmp_path / "out", job)
    run_here(table, tmp_path / "out", small_job(batch=2, threads=2))  # how, not what
    drawn.clear()
    summary = run_here(table, tmp_path / "out", job, new=True)
    redrawn = job.settings or not job.mark
    assert (len(drawn), summary.taken) == ((6, 0) if redrawn else (0, 6))
    assert run_here(table, tmp_path / "out", job).drawn == 0


def test_another_job_may_follow_one_that_drew_nothing(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_scribe(monkeypatch)
    (tmp_path / "wrong.csv").write_text("prompt,seeed\nfox,1\n")
    with pytest.raises(InputError, match="seeed"):
        run_here(str(tmp_path / "wrong.csv"), tmp_path / "out")
    assert run_here(table, tmp_path / "out", small_job(settings={"guidance_scale": 3.0})).drawn == 6


def test_another_model_is_refused(
    table: str, tmp_path: Path, built_model: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pipe(monkeypatch, pipe)
    steps = {"num_inference_steps": 1}
    run_here(table, tmp_path / "out", Job(Model(str(built_model)), steps))
    with pytest.raises(InputError, match=r"model was \w{12} \(.*tiny\), is \w{12} \(embedded\)"):
        run_here(table, tmp_path / "out", Job(Model(), steps))


def test_numbers_of_the_output_are_kept_where_none_are_given(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_scribe(monkeypatch)
    run_here(table, tmp_path / "out", Job(Model(), {}, shard_size=4, format="files", batch=3))
    run_here(table, tmp_path / "out", Job(Model(), {}))
    record = json.loads((tmp_path / "out/job.json").read_text())
    assert (record["shard_size"], record["format"], record["batch"], record["threads"]) == (4, "files", 3, 1)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (small_job(settings={"guidance_scale": 77.0}), "guidance_scale must be a finite number"),
        (small_job(shard_size=10**6), "shard size must be"),
        (small_job(format="zip"), "format must be one of webdataset, parquet, files"),
        (small_job(batch=-1), "batch must be"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_drawn(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job, message: str
) -> None:
    drawn = use_scribe(monkeypatch)
    with pytest.raises(InputError, match=message):
        run_here(table, tmp_path / "out", job)
    assert not drawn and not (tmp_path / "out/job.json").exists()


def test_failures_stop_a_run_over_the_limit_and_are_tried_again_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = use_scribe(monkeypatch)
    table = write_table(tmp_path / "rows.jsonl", [{"prompt": "bad", "seed": n} for n in range(4)] + ROWS)
    with pytest.raises(InputError, match=r"3 rows may fail, got 4 that did; see .*out/failures, then add"):
        run_here(table, tmp_path / "out", max_failures=3)
    assert drawn == ["bad"] * 4
    with pytest.raises(InputError, match="3 rows may fail, got 4"):  # before anything is drawn
        run_here(table, tmp_path / "out", max_failures=3)
    assert len(drawn) == 4
    assert run_here(table, tmp_path / "out", max_failures=4).failed == 4
    undisturbed = contents(tmp_path / "out")
    monkeypatch.setattr("tests.scale.small.Scribe.draw", lambda scribe, rows: iter(["still bad" for _ in rows]))
    again = run_here(table, tmp_path / "out", max_failures=4, retry_failed=True)
    assert (again.drawn, again.failed) == (0, 4)
    monkeypatch.undo()
    use_scribe(monkeypatch)
    assert run_here(table, tmp_path / "out", retry_failed=True).failed == 4
    assert contents(tmp_path / "out") == undisturbed
    assert run_here(table, tmp_path / "out").failed == 4


@pytest.mark.parametrize("form", list(FORMATS))
def test_a_shard_of_which_all_rows_failed_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    drawn = use_scribe(monkeypatch)
    table = write_table(tmp_path / "rows.jsonl", [*[{"prompt": "bad", "seed": n} for n in range(2)], *ROWS])
    for _ in range(2):
        assert run_here(table, tmp_path / "out", small_job(format=form)).failed == 2
    assert len(drawn) == 8


def test_failed_rows_that_can_be_drawn_now_join_those_of_their_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = use_scribe(monkeypatch)
    table = write_table(tmp_path / "rows.jsonl", [{"prompt": "bad"}, *ROWS])
    run_here(table, tmp_path / "out")
    from tests.scale.small import Picture, Scribe

    monkeypatch.setattr(
        Scribe, "draw", lambda scribe, rows: (Picture(b"good", {"prompt": "bad", "seed": 0}) for _ in rows)
    )
    summary = run_here(table, tmp_path / "out", retry_failed=True)
    assert (summary.drawn, summary.taken, summary.failed) == (1, 1, 0) and len(drawn) == 7
    assert not list((tmp_path / "out/failures").iterdir())


def test_damage_is_found_and_only_what_is_damaged_is_drawn(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, said = use_scribe(monkeypatch), list[str]()
    out = tmp_path / "out"
    run_here(table, out)
    before = contents(out)
    assert run_here(table, out, verify=True).drawn == 0
    first, second, third = sorted((out / "shards").iterdir())
    first.write_bytes(
        first.read_bytes().replace(b"a picture of {'prompt': 'picture 1'", b"a picture of {'prompt': 'picture X'")
    )
    second.unlink()
    (out / "manifests" / f"{third.stem}.jsonl").write_text("{}")
    drawn.clear()
    summary = run_here(table, out, verify=True, said=said)
    assert drawn == ["picture 1", "picture 2", "picture 3", "picture 4", "picture 5"] and summary.taken == 1
    assert len(said) == 3 and contents(out) == before


def test_a_table_that_changes_while_it_is_drawn_is_noticed(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_scribe(monkeypatch)
    real = batch.make_plan

    def plan(*given: Any, **named: Any) -> Any:
        made = real(*given, **named)
        write_table(tmp_path / "rows.jsonl", [*ROWS[:3], {"prompt": "other"}, *ROWS[4:]])
        return made

    monkeypatch.setattr(batch, "make_plan", plan)
    with pytest.raises(InputError, match="has changed while it was drawn"):
        run_here(table, tmp_path / "out")
    monkeypatch.setattr(batch, "make_plan", real)
    assert run_here(table, tmp_path / "out").drawn == 4


def test_progress_as_json_lines(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_scribe(monkeypatch)
    run_here(table, tmp_path / "out", progress=str(tmp_path / "progress.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [line["done"] for line in lines] == [2, 4, 6] and lines[-1]["rows"] == 6 and lines[-1]["drawn"] == 6
    write_table(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "seventh"}])
    with pytest.raises(StorageError, match="choose another --progress"):
        run_here(table, tmp_path / "out", progress=str(tmp_path / "none/progress.jsonl"))


def test_pictures_of_a_model_are_the_same_for_any_number_of_workers(
    built_model: Path, table: str, tmp_path: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(Model(str(built_model), "cpu"), {"num_inference_steps": 2}, shard_size=2)
    run_batch(table, str(tmp_path / "two"), job, How(workers=2))
    use_pipe(monkeypatch, pipe)
    run_here(table, tmp_path / "here", job)
    assert contents(tmp_path / "two") == contents(tmp_path / "here")


def test_a_place_in_memory_is_of_one_process(table: str) -> None:
    with pytest.raises(InputError, match="add --workers 0"):
        run_batch(table, "memory://here", small_job(), How())
