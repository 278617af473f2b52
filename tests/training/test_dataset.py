"""Captioned folders: what is read, what is refused, and that batch order is a pure function of seed and step."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff.errors import InputError
from training.config import DataConfig
from training.dataset import batch_indices, composite, load_images


def folder_of(path: Path, rows: list[dict[str, object]], pictures: int = 4) -> Path:
    for index in range(pictures):
        Image.new("RGB", (20, 10), (index * 10, 0, 0)).save(path / f"{index}.png")
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rows(count: int = 4) -> list[dict[str, object]]:
    return [
        {"file_name": f"{index}.png", "text": f"picture {index}", "kind": "ab"[index % 2]} for index in range(count)
    ]


def test_pictures_are_cropped_square_and_captioned(tmp_path: Path) -> None:
    data = load_images(DataConfig(folder=str(folder_of(tmp_path, rows())), size=8))
    assert data.images.shape == (4, 8, 8, 4)
    assert data.rows[1]["captions"] == ["picture 1"]


def test_keep_and_drop_choose_rows(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, rows()))
    assert len(load_images(DataConfig(folder=folder, size=8, keep={"kind": ["a"]}))) == 2
    assert len(load_images(DataConfig(folder=folder, size=8, drop={"kind": ["a"]}))) == 2
    with pytest.raises(InputError, match="no picture is left"):
        load_images(DataConfig(folder=folder, size=8, keep={"kind": ["c"]}))


@pytest.mark.parametrize(
    "bad",
    [{"file_name": "0.png"}, {"file_name": "0.png", "text": " "}, {"file_name": "no.png", "text": "x"}, {"text": "x"}],
)
def test_missing_caption_or_file_is_refused_by_name(tmp_path: Path, bad: dict[str, object]) -> None:
    folder = folder_of(tmp_path, [*rows(), bad])
    with pytest.raises(InputError, match="1 of 5 rows are unusable"):
        load_images(DataConfig(folder=str(folder), size=8))


def test_one_bad_row_in_many_is_skipped_and_named(tmp_path: Path) -> None:
    many = [{"file_name": "0.png", "text": "x"}] * 150
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data = load_images(
        DataConfig(folder=str(folder_of(tmp_path, [*many, {"file_name": "broken.png", "text": "y"}])), size=8)
    )
    assert len(data) == 150
    assert len(data.skipped) == 1 and data.skipped[0].startswith("broken.png")


def test_folder_without_metadata_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metadata\.jsonl"):
        load_images(DataConfig(folder=str(tmp_path), size=8))
    (tmp_path / "metadata.jsonl").write_text("{not json")
    with pytest.raises(InputError, match=":1 is not JSON"):
        load_images(DataConfig(folder=str(tmp_path), size=8))


def test_every_epoch_sees_every_sample_once_whatever_the_batch_size() -> None:
    sequence = [int(i) for step in range(14) for i in batch_indices(7, 3, step, seed=1)]
    assert all(sorted(sequence[start : start + 7]) == list(range(7)) for start in range(0, 42, 7))
    assert sequence == [int(i) for step in range(6) for i in batch_indices(7, 7, step, seed=1)]
    assert sequence[:7] != [int(i) for i in batch_indices(7, 7, 0, seed=2)]


def test_composite_mixes_by_alpha() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], dtype=np.uint8)
    assert composite(rgba, (10, 20, 30)).tolist() == [[[200, 0, 0], [10, 20, 30]]]
