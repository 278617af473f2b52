"""What is written is there whole or not at all, and what cannot be is said in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latentdiff.errors import StorageError
from latentdiff.files import check_writable, make_folder, write_file


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(descriptor: int) -> None:
        raise error

    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_unwritable_places_are_found_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="there is no folder"):
        check_writable(tmp_path / "none" / "a.png")
    with pytest.raises(StorageError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        check_writable("/proc/a.png")
    for path in (tmp_path / f"{'a' * 300}.png", tmp_path / "a\0.png", tmp_path / "\ud800.png"):
        with pytest.raises(StorageError, match="cannot write"):
            check_writable(path)
        with pytest.raises(StorageError, match="cannot write"):
            write_file(path, b"")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "a", tmp_path / ("a" * 300), tmp_path / "a\0"):
        with pytest.raises(StorageError, match=r"cannot write to .*; choose another place") as raised:
            make_folder(path)
        assert "\n" not in str(raised.value)
