"""Shared by the tests of `latentdiff.scale`: tables, jobs, a stand-in that draws bytes, and what an output holds."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from latentdiff.pipeline import Pipeline
from latentdiff.scale import local
from latentdiff.scale.batch import How, Summary, run_batch
from latentdiff.scale.drawing import Artist, Style
from latentdiff.scale.formats import Picture
from latentdiff.scale.job import Job
from latentdiff.scale.model import Model
from latentdiff.scale.plan import Layout, Task, read_shards
from latentdiff.scale.rows import Columns, Maker, Row
from latentdiff.scale.store import LocalStore
from latentdiff.scale.table import open_table
from latentdiff.scale.worker import Crew
from tests.two_processes import processes_called

OWN = ("lock", "job.json", ".tmp")  # of an output, besides pictures


def tasks(tmp_path: Path, prompts: list[str]) -> Iterator[Task]:
    """Yield shards of two rows, to be drawn."""
    table = open_table(write_table(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in prompts]))
    yield from map(Task, read_shards(table, Layout(Maker({"model_hash": "0"}), Columns(), "files", 2)))


def forked_crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    """Return a crew whose workers are forked, with what a test has put in place of their artist."""
    real = local.multiprocessing.get_context
    monkeypatch.setattr(local.multiprocessing, "get_context", lambda kind: real("fork"))
    return Crew(Model(device="cpu"), Style(), LocalStore(tmp_path / "out"), "files", ("id",))


class Scribe(Artist):
    """Draws, of every row, a text that says what it is; rows of the prompt `bad` cannot be drawn."""

    drawn: list[str]

    def __init__(self, style: Any = None, begins: Callable[[Sequence[Row]], None] | None = None) -> None:
        self.begins, self.drawn = begins or (lambda rows: None), []

    def draw(self, rows: Sequence[Row]) -> Iterator[Picture | str]:
        for row in rows:
            self.begins([row])
            self.drawn.append(row.prompt)
            settings = {"prompt": row.prompt, "seed": 0, **row.settings}
            yield "it is bad" if row.prompt == "bad" else Picture(f"a picture of {settings}".encode(), settings)


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write JSON lines and return the path."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def small_job(**more: Any) -> Job:
    """Return a job of the embedded model with shards of two rows."""
    return Job(Model(device="cpu"), more.pop("settings", {}), shard_size=more.pop("shard_size", 2), **more)


def run_here(table: str, out: Any, job: Job | None = None, **how: Any) -> Summary:
    """Run a job in this process."""
    said = how.pop("said", [])
    return run_batch(table, str(out), job or small_job(), How(workers=0, say=said.append, **how))


def contents(out: Path, leave_out: Sequence[str] = OWN) -> dict[str, str]:
    """Return the hash of every file of an output by its path."""
    files = (file for file in sorted(out.rglob("*")) if file.is_file())
    names = {file: file.relative_to(out).as_posix() for file in files}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file, name in names.items()
        if name.split("/")[0] not in leave_out
    }


def in_a_fork(act: Callable[[], None]) -> int:
    """Run a function in a fork of this process and return its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ray_workers() -> list[int]:
    """Return the processes of Ray on this machine that draw."""
    return processes_called("ray::MapWorker")


def die_at(boundary: int) -> None:
    """Have this process killed before its operation on files of that number, counted from 1."""
    passed = 0

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*given: Any, **named: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return act

    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, watched(getattr(os, name)))


def use_scribe(monkeypatch: Any) -> list[str]:
    """Have all jobs of this process drawn by a `Scribe`; return the prompts that it draws."""
    names = ("model", "model_hash", "model_defaults", "prediction_type", "dtype", "engine", "embeddings")
    facts = dict.fromkeys(names, "one") | {"engine": "eager"}
    scribe = Scribe()
    monkeypatch.setattr(Crew, "artist", lambda crew, begins=None: scribe)
    monkeypatch.setattr(Model, "facts", lambda model: facts)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which takes long on a busy disk
    return scribe.drawn


def use_pipe(monkeypatch: Any, pipe: Pipeline) -> None:
    """Have all jobs of this process drawn by a model that is loaded already."""
    monkeypatch.setattr(Model, "load", lambda model: pipe)
