"""The digits are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from latentdiff.training.datasets import digits

from latentdiff.errors import InputError, StorageError


class Few:
    """As many digits as make both splits."""

    images = np.arange(7 * 64).reshape(7, 8, 8) % 17
    target = np.arange(7)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    monkeypatch.setattr(datasets, "load_digits", Few)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_a_build_that_is_broken_off_leaves_nothing(
    tmp_path: Path, made: bool, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "digits"
    if made:
        out.mkdir()
    write, written = Path.write_bytes, []

    def fail(file: Path, data: bytes) -> int:
        written.append(file)
        if len(written) > after:
            raise KeyboardInterrupt
        return write(file, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", fail)
        digits.build(str(out))
    assert [entry.name for entry in tmp_path.iterdir()] == (["digits"] if made else [])
    assert digits.build(str(out)) == {"train": 5, "test": 2}
    assert len(list(out.glob("*/*.png"))) == 7


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-digits" / "train").mkdir(parents=True)
    (tmp_path / ".tmp-digits" / "train" / "0000.png").write_bytes(b"half")
    digits.build(str(tmp_path / "digits"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]
    with pytest.raises(InputError, match="is not empty; choose another folder"):
        digits.build(str(tmp_path / "digits"))


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "file/digits", "\ud800"])
def test_places_that_cannot_be_written_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        digits.build(str(tmp_path / name))
