"""Formats: what is written is read again, is the same to the byte, and is what others read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from latentdiff.training.data.shards import read_shards

from latentdiff.scale.formats import FORMATS, Picture, Sample, damage
from latentdiff.scale.store import LocalStore, Store, open_store

SAMPLES = [
    Sample(
        f"k{n}", f"name{n}", n + 1, {"id": f"i{n}"} if n else {}, Picture(b"png" * (n + 1), {"prompt": "é", "seed": n})
    )
    for n in range(3)
]


def write(store: Store, form: str, samples: Any = SAMPLES) -> dict[str, Any]:
    return FORMATS[form].write(store, "00000000-aa", iter(samples), ("id",))


@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.parametrize("form", list(FORMATS))
def test_pictures_are_read_as_they_were_written(tmp_path: Path, form: str, place: str) -> None:
    store = open_store(str(tmp_path) if place == "local" else f"memory://{tmp_path.name}-{form}")
    files = write(store, form)
    found = dict(FORMATS[form].read(store, FORMATS[form].path("00000000-aa"), {"k0", "k2", "none"}))
    assert found == {"k0": SAMPLES[0].picture, "k2": SAMPLES[2].picture}
    assert not any(damage(store, path, expected) for path, expected in files.items())
    path = next(iter(files))
    store.remove(path)
    assert damage(store, path, files[path])


@pytest.mark.parametrize("form", list(FORMATS))
def test_the_same_pictures_give_the_same_bytes(tmp_path: Path, form: str) -> None:
    assert write(LocalStore(tmp_path / "a"), form) == write(LocalStore(tmp_path / "b"), form)


def test_the_tar_file_is_a_webdataset_that_training_reads(tmp_path: Path) -> None:
    write(LocalStore(tmp_path), "webdataset")
    file = tmp_path / "shards/00000000-aa.tar"
    with tarfile.open(file) as archive:
        assert archive.getnames()[:3] == ["k0.json", "k0.png", "k0.txt"]
        assert {entry.mtime for entry in archive} == {0}
        told = json.load(io.TextIOWrapper(archive.extractfile("k1.json")))  # type: ignore[arg-type]
    own = {"id": "i1", "name": "name1", "row": 2, "prompt": "é", "seed": 1}
    assert told == {**own, "settings": {"prompt": "é", "seed": 1}}
    members = read_shards([file])
    assert [(one.key, one.size, one.row["text"]) for one in members] == [("k0", 3, "é"), ("k1", 6, "é"), ("k2", 9, "é")]


def test_the_parquet_file_has_a_column_of_pictures(tmp_path: Path) -> None:
    write(LocalStore(tmp_path), "parquet")
    table = pq.read_table(tmp_path / "shards/00000000-aa.parquet")
    first, second, _ = table.to_pylist()
    assert first["image"] == {"bytes": b"png", "path": "k0.png"} and first["id"] is None and second["id"] == "i1"
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}


def test_an_empty_shard_is_there(tmp_path: Path) -> None:
    """One of which all rows failed."""
    for form in ("webdataset", "parquet"):
        store = LocalStore(tmp_path / form)
        (path,) = write(store, form, [])
        assert not list(FORMATS[form].read(store, path, {"k0"}))
