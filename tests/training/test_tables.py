"""Captions as people keep them: in tables of any program, in text beside pictures, not at all; and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from latentdiff.training.config import DataConfig
from latentdiff.training.data.dataset import load_images, open_images, read_captions
from latentdiff.training.data.source import MissingSplitError
from latentdiff.training.data.sources import open_source
from PIL import Image

from latentdiff.errors import InputError
from tests.training.test_sources import PICTURES, opened, write_tar

ROWS = [("0.png", "ein Bär"), ("1.png", "une forêt, verte")]


def pictures(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index}.png").write_bytes(PICTURES[index % 3])
    return folder


def captions(place: Path, **values: Any) -> list[list[str]]:
    return [row["captions"] for row in load_images(DataConfig(folder=str(place), size=8, **values)).rows]


JSONL = "\n".join(json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in ROWS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "table.csv", "table.tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_other_programs_are_read(tmp_path: Path, encoding: str, ends: str, name: str, separator: str) -> None:
    text = JSONL
    if not name.endswith("jsonl"):
        separator = "\t" if name.endswith("tsv") else separator
        text = "\n".join(separator.join(f'"{cell}"' for cell in row) for row in [("file_name", "text"), *ROWS])
    place = pictures(tmp_path)
    (place / name).write_bytes(text.replace("\n", ends).encode(encoding))
    source = opened(place if name.startswith("metadata") else place / name)
    assert [row["captions"] for row in source.rows] in ([t for _, t in ROWS], [[t] for _, t in ROWS])
    assert source.read(1) == PICTURES[1]


@pytest.mark.parametrize("name", ["metadata.jsonl", "table.csv"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    text = JSONL if name.endswith("jsonl") else "file_name,text\n0.png,ein Bär\n"
    (pictures(tmp_path) / name).write_bytes(text.encode(encoding))
    cause = (
        r"is not UTF-8 \(byte 0xe4\), perhaps Windows-1252" if encoding == "cp1252" else "as UTF-16 without its mark"
    )
    with pytest.raises(InputError, match=cause):
        opened(tmp_path / name if name == "table.csv" else tmp_path)


def test_paths_written_on_windows_are_found(tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    (tmp_path / "table.csv").write_text("path,caption\nimages\\0.png,a\nimages\\1.png,b\n")
    assert captions(tmp_path / "table.csv") == [["a"], ["b"]]


@pytest.mark.parametrize("after", ["", "\n1.png,b\n" * 5000])
def test_a_quotation_mark_that_is_not_closed_is_named_in_one_line(tmp_path: Path, after: str) -> None:
    (pictures(tmp_path) / "table.csv").write_text(f'file_name,text\n0.png,a\n1.png,"b{after}')
    with pytest.raises(InputError, match=r"table\.csv:3 is not CSV that can be read: a quotation mark is not closed"):
        opened(tmp_path / "table.csv")


def test_metadata_csv_has_a_row_for_each_caption(tmp_path: Path) -> None:
    (pictures(tmp_path) / "metadata.csv").write_text("file_name,text\n0.png,a\n0.png,b\n1.png,c\n")
    assert captions(tmp_path) == [["a", "b"], ["c"]]
    (tmp_path / "test").mkdir()
    pictures(tmp_path / "test", 1)
    (tmp_path / "test" / "metadata.csv").write_text("file_name,text\n0.png,d\n")
    assert open_source(DataConfig(folder=str(tmp_path), size=8), "test").rows[0]["captions"] == ["d"]


def test_captions_in_text_files_beside_pictures(tmp_path: Path) -> None:
    place = pictures(tmp_path / "set", 3)
    for index, text in enumerate(("a fox\n", "\ufeffein Bär", "b")):
        (place / f"{index}.txt").write_text(text, encoding="utf-8")
    (place / "._0.png").write_bytes(b"of macOS")
    (place / ".hidden.png").write_bytes(b"")
    assert captions(place) == [["a fox"], ["ein Bär"], ["b"]]
    assert captions(place, captions=["all"]) == [["all"]] * 3
    (place / "2.txt").unlink()
    data = load_images(DataConfig(folder=str(place), size=8))
    assert [(row["name"], row["reason"]) for row in data.skipped] == [("2.png", "no caption")]
    (place / "2.txt").write_bytes("Bär".encode("cp1252"))
    data = load_images(DataConfig(folder=str(place), size=8))
    assert "no caption (its .txt file:1 is not UTF-8 (byte 0xe4)" in data.skipped[0]["reason"]


def test_captions_in_caption_files(tmp_path: Path) -> None:
    """As taggers write them; a .txt file says it, where there are both."""
    place = pictures(tmp_path / "set", 3)
    for name, text in {"0.caption": "a fox\n", "1.caption": "tags", "1.txt": "a bear", "2.CAPTION": "a cat"}.items():
        (place / name).write_text(text)
    assert captions(place) == [["a fox"], ["a bear"], ["a cat"]]
    (place / "0.caption").write_bytes("Bär".encode("cp1252"))
    data = load_images(DataConfig(folder=str(place), size=8))
    assert "no caption (its .caption file:1 is not UTF-8" in data.skipped[0]["reason"]
    members = [("a.png", PICTURES[0]), ("a.caption", b"tags"), ("b.txt", b"a bear"), ("b.png", PICTURES[1])]
    write_tar(tmp_path / "0.tar", [*members, ("a.txt", b"a fox"), ("b.caption", b"x"), ("c.caption", b"a cat\n")])
    assert [row["captions"] for row in opened(tmp_path / "0.tar").rows] == ["a fox", "a bear", "a cat"]


def test_what_macos_puts_beside_files_is_no_picture_of_a_shard(tmp_path: Path) -> None:
    beside = [(f"set/._{name}", b"of macOS") for name in ("0.png", "0.txt")]
    write_tar(tmp_path / "0.tar", [("set/0.png", PICTURES[0]), ("set/0.txt", b"a"), *beside])
    assert opened(tmp_path / "0.tar").names == ["0.tar: set/0"]


def test_splits_of_pictures_with_text_files(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (pictures(tmp_path / split, 1) / "0.txt").write_text(split)
    for split in ("train", "validation"):
        assert open_source(DataConfig(folder=str(tmp_path), size=8), split).rows[0]["captions"] == split
    with pytest.raises(MissingSplitError, match="has no split 'test'"):
        open_source(DataConfig(folder=str(tmp_path), size=8), "test")


def test_pictures_without_captions_are_trained_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = pictures(tmp_path / "set")
    data = open_images(DataConfig(folder=str(place), size=8), 1, tmp_path)
    assert [row["captions"] for row in data.rows] == [[""], [""]]
    assert "says of no picture what it shows: all are trained on with an empty caption" in capsys.readouterr().err
    assert read_captions(DataConfig(folder=str(place), size=8)) == [[""], [""]]
    assert captions(place, captions=["a fox"]) == [["a fox"]] * 2
    write_tar(place / "0.tar", [("a.png", PICTURES[0]), ("a.txt", b"in the shard")])
    assert captions(place) == [["in the shard"]]


def test_what_is_left_out_enlarged_or_cut_off_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "set"
    place.mkdir()
    for name, size in {"tiny": (3, 2), "long": (1280, 64), "usual": (70, 64), "unnamed": (64, 64)}.items():
        Image.new("RGB", size).save(place / f"{name}.png")
    rows = [{"file_name": f"{name}.png", "text": name} for name in ("tiny", "long", "usual")]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    open_images(DataConfig(folder=str(place), size=64), 1, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == f"1 of 4 pictures are not in {place}/metadata.jsonl and left out, first 'unnamed.png'"
    assert lines[1].startswith("1 of 3 pictures are enlarged more than 4 times, 'tiny.png' 32 times: ")
    assert lines[2].startswith("1 of 3 pictures lose more than 75% to the crop, 'long.png' 95%: ")
    open_images(DataConfig(folder=str(place), size=64, crop="random"), 1, tmp_path)
    assert "lose more" not in capsys.readouterr().err
