"""Sets of pictures that are damaged, odd or hostile: each is read right, or refused in a line that names the cause."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from latentdiff.training.config import DataConfig
from latentdiff.training.data import dataset, shards
from latentdiff.training.data.dataset import CaptionedImages, load_images, open_images
from latentdiff.training.data.sources import open_source
from PIL import Image

from latentdiff.errors import InputError, StorageError
from tests.training.test_sources import PICTURES, offline, opened, saved, write_tar

__all__ = ["offline"]  # a fixture that every test here uses
LONG = "a" * 5000


def folder_of(place: Path, rows: list[dict[str, Any]], good: int = 300) -> Path:
    """Write a folder of so many good rows, and some others after them."""
    place.mkdir(exist_ok=True)
    (place / "0.png").write_bytes(PICTURES[0])
    lines = [json.dumps(row) for row in [{"file_name": "0.png", "text": "x"}] * good + rows]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


def trained_on(place: Path, run: Path, **values: Any) -> CaptionedImages:
    return open_images(DataConfig(folder=str(place), size=8, **values), 1, run)


def sparse(file: Path, size: int) -> Path:
    with file.open("wb") as stream:
        stream.truncate(size)
    return file


NO_PICTURES = {
    "/dev/zero": "lies outside of the data set",
    "../other.png": "lies outside of the data set",
    "sub/../../other.png": "lies outside of the data set",
    ".": "lies outside of the data set",
    "pipe.png": "must be a regular file, got a pipe",
    "device.png": "must be a regular file, got a device",
    "folder.png": "must be a regular file, got a folder",
    "sparse.png": "must be at most 256 MiB, got 20,480 MiB",
    LONG: "cannot be read (File name too long)",
    "a\0.png": "cannot be read (embedded null byte)",
    "\ud83e.png": "surrogates not allowed",
    "exif.png": None,  # which is a picture
    "absent.png": "cannot be read (No such file or directory)",
}


@pytest.mark.parametrize("name", NO_PICTURES, ids=lambda name: name[:20].encode("ascii", "backslashreplace").decode())
@pytest.mark.parametrize("values", [{}, {"held_out": 0.5}, {"crop": "random"}], ids=["held", "held out", "lazy"])
def test_what_is_no_picture_is_skipped_and_named(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    place = folder_of(tmp_path / "set", [{"file_name": name, "text": "y"}, {"file_name": "1.png", "text": "z"}], 3)
    (place / "1.png").write_bytes(PICTURES[1])
    (tmp_path / "other.png").write_bytes(PICTURES[1])
    os.mkfifo(place / "pipe.png")
    (place / "device.png").symlink_to("/dev/zero")
    (place / "folder.png").mkdir()
    sparse(place / "sparse.png", 20 * 2**30)
    Image.new("RGB", (8, 8)).save(place / "exif.png", exif=b"Exif\0\0garbage!!")
    try:
        data = trained_on(place, tmp_path / "run", **values)
    except InputError as error:
        assert "leaves none to" in str(error)
        return
    reasons = [row["reason"] for row in data.skipped]
    expected = NO_PICTURES[name]
    assert len(reasons) == (expected is not None)
    assert not expected or expected in reasons[0]
    if reasons:
        lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["name"] == name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' * 5000, "nested too deep"),
        (f'{{"seed": {"9" * 5000}}}', "not JSON"),
        ("[" + "1," * 2**25 + "1]", "each line is one object, of one picture"),
        ("[1]", "must be an object, got list"),
    ],
    ids=["array", "object", "digits", "long", "list"],
)
def test_rows_that_are_no_json_of_ours_are_named(tmp_path: Path, line: str, message: str) -> None:
    place = folder_of(tmp_path / "set", [], 2)
    with (place / "metadata.jsonl").open("a") as stream:
        stream.write("\n" + line)
    with pytest.raises(InputError, match=message) as caught:
        opened(place)
    assert "metadata.jsonl:3" in str(caught.value)


def test_odd_values_of_columns_are_none(tmp_path: Path) -> None:
    odd = [{"file_name": "0.png", "text": "x", "thing": value, "color": value, "style": value} for value in ([], {}, 7)]
    place = folder_of(tmp_path / "set", odd, 1)
    data = trained_on(place, tmp_path / "run", variants=["hue", "pair", "flip"])
    from latentdiff.training.data.augment import plan_variants

    config = DataConfig(folder=str(place), size=8, variants=["hue", "pair", "flip"])
    assert all(one.captions == ["x"] for n in range(4) for one in plan_variants(data, n, config, 0))


@pytest.mark.parametrize("caption", ["half \ud83e", ["fine", "half \udc00"]])
def test_half_a_character_in_a_caption_is_a_bad_row(tmp_path: Path, caption: Any) -> None:
    place = folder_of(tmp_path / "set", [{"file_name": "0.png", "captions": caption}])
    data = trained_on(place, tmp_path / "run")
    assert [row["reason"] for row in data.skipped] == ["a caption with half a character (a lone surrogate)"]


FOLDERS = [
    "hub:",
    "hub:../..",
    "hub:/etc",
    "hub:a/b/c",
    "hub:a b",
    LONG,
    f"{LONG}/*.tar",
    "a\0b",
    "a\ud800b",
    "{0..9}",
    "",
]


@pytest.mark.parametrize("place", FOLDERS, ids=lambda place: place[:10].encode("ascii", "backslashreplace").decode())
def test_places_that_are_none_are_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = DataConfig(folder="set", size=8).model_copy(update={"folder": place})  # not checked by the config itself
    with pytest.raises(InputError) as caught:
        open_source(config)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
@pytest.mark.parametrize("name", ["x.tar", "x.csv", "metadata.jsonl", "x.jsonl"])
def test_tables_and_shards_are_regular_files(tmp_path: Path, kind: str, name: str) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        sparse(tmp_path / name, 4 * 2**30)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(InputError):
            opened(place)


def test_a_picture_of_9_gb_in_a_shard_is_skipped(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", PICTURES[0]), ("a.txt", b"a"), ("b.txt", b"b")])
    entry = tarfile.TarInfo("b.png")
    entry.size = 9 * 2**30
    whole = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + entry.tobuf()
    with (tmp_path / "0.tar").open("wb") as stream:
        stream.write(whole)
        stream.truncate(len(whole) + entry.size + 1024)
    data = load_images(DataConfig(folder=str(tmp_path), size=8))
    assert [row["captions"] for row in data.rows] == [["a"]]
    assert data.skipped[0]["reason"] == "is larger than 256 MiB"


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"ARROW1\0\0" + b"\xff" * 99])
def test_damaged_arrow_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.arrow").write_bytes(content)
    with pytest.raises(InputError, match="`datasets` cannot load it"):
        opened(tmp_path / "x.arrow")


@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_dict.json", "state.json"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"[]", b"null", b'{"splits": 7}', b'{"splits": ["../.."]}', b"[" * 9999]
)
def test_damaged_saved_sets_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    place = saved(tmp_path)
    (place / name).write_bytes(content)
    try:
        opened(place)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert name == "dataset_info.json"  # what it says is not needed


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "..", "a\\b", "", 7])
def test_a_saved_set_reads_nothing_outside_of_its_folder(tmp_path: Path, name: Any) -> None:
    place = saved(tmp_path)
    state = json.loads((place / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (place / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="which is nothing in its folder"):
        opened(place)


def test_paths_in_parquet_stay_inside_too(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "set").mkdir()
    (tmp_path / "out.png").write_bytes(PICTURES[0])
    (tmp_path / "set" / "in.png").write_bytes(PICTURES[1])
    paths = ["../out.png", "in.png", str(tmp_path / "set" / "in.png")]
    rows = {"image": paths, "text": ["x"] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "t.parquet")
    source = opened(tmp_path / "set" / "t.parquet")
    with pytest.raises(ValueError, match="lies outside"):
        source.read(0)
    assert source.read(1) == source.read(2) == PICTURES[1]


KEPT = [
    "",
    "{",
    "[",
    "null",
    "{}",
    "[]",
    "[1, 2, 3]",
    '[["a", 1, 1]]',
    '[["{digest}", 0, 8]]',
    '[["{digest}", 8]]',
    "[" * 9999,
]


@pytest.mark.parametrize("content", KEPT, ids=range(len(KEPT)))
def test_damaged_findings_are_found_again(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 0)
    place = folder_of(tmp_path / "set", [], 1)
    first = trained_on(place, tmp_path / "run")
    (file,) = (tmp_path / "run" / "cache").glob("pictures-*.json")
    whole = file.read_text()
    file.write_text(content.replace("{digest}", "a" * 64))
    assert trained_on(place, tmp_path / "run").samples == first.samples
    assert "is damaged; the pictures are examined again" in capsys.readouterr().err
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache" / "pictures.lock").mkdir(parents=True)
    place = folder_of(tmp_path / "set", [], 1)
    with pytest.raises(StorageError, match="cannot write to"):
        open_images(DataConfig(folder=str(place), size=8, crop="random"), 1, tmp_path, tmp_path / "cache")


def test_what_is_kept_of_a_member_is_checked() -> None:
    good = {"key": "a", "row": {}, "offset": 512, "size": 9, "finding": ["a" * 64, 8, 8]}
    assert shards._is_member(good) and shards._is_member(good | {"offset": None, "finding": "no picture"})
    for bad in (
        good | {"more": 1},
        good | {"size": "9"},
        good | {"finding": [1, 2, 3]},
        good | {"row": []},
        {},
        [],
        None,
    ):
        assert not shards._is_member(bad)
