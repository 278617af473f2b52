"""Pictures to measure by: never trained on, whatever they are kept in, and the same ones as a set grows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentdiff.training.config import DataConfig
from latentdiff.training.data import dataset
from latentdiff.training.data.dataset import CaptionedImages, is_held_out, open_held_out, open_images
from PIL import Image

from latentdiff.errors import InputError
from tests.training.test_sources import CAPTIONS, KINDS, PICTURES, image_folder, offline, shards, table, write_tar

__all__ = ["offline"]  # a fixture that every test here uses
DIGESTS = [hashlib.sha256(picture).hexdigest() for picture in PICTURES]
FRACTIONS = [int(digest, 16) / 2**256 for digest in DIGESTS]
BETWEEN = (min(FRACTIONS) + sorted(FRACTIONS)[1]) / 2  # a share of which one picture is held out


def folder_of(folder: Path, colors: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    rows = []
    for index, color in enumerate(colors):
        Image.new("RGB", (8, 8), (color, 0, 99)).save(folder / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {color}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def components_of(place: Path, run: Path, **values: Any) -> tuple[CaptionedImages, CaptionedImages | None]:
    config = DataConfig(folder=str(place), size=8, **values)
    return open_images(config, 1, run), open_held_out(config, run / "cache", 64)


def colors_of(data: CaptionedImages | None) -> list[int]:
    assert data is not None
    return [int(data.images[index][0, 0, 0]) for index in range(len(data))]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_share_is_held_out_and_stays_as_the_set_grows(
    tmp_path: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 2**30 if in_memory else 0)
    colors = [*range(60), 7, 8, 9]  # three pictures twice
    trained, held_out = components_of(folder_of(tmp_path / "set", colors), tmp_path / "run", held_out=0.25)
    assert sorted(colors_of(trained) + colors_of(held_out)) == sorted(colors)
    assert not set(colors_of(trained)) & set(colors_of(held_out))
    assert 5 < len(colors_of(held_out)) < 25
    assert [row["captions"] for row in held_out.rows] == [[f"picture {color}"] for color in colors_of(held_out)]
    more, others = components_of(
        folder_of(tmp_path / "other", list(range(90, 0, -1))), tmp_path / "more", held_out=0.25
    )
    assert set(colors_of(held_out)) - {0} <= set(colors_of(others))
    assert set(colors_of(trained)) - {0} <= set(colors_of(more))


def test_holding_out_does_not_move_the_rest(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "set", list(range(40)))
    whole, _ = components_of(place, tmp_path / "whole")
    trained, held_out = components_of(place, tmp_path / "run", held_out=0.25)
    left_out = set(colors_of(held_out))
    order = [place for step in range(40) for place in whole.order.batch(step, 1, 3)[0] if place not in left_out]
    drawn = [trained.samples[trained.order.batch(step, 1, 3)[0][0]].place for step in range(len(trained))]
    assert drawn == order


@pytest.mark.parametrize("write", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("in_memory", [True, False])
def test_every_kind_can_be_split(tmp_path: Path, write: Any, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 2**30 if in_memory else 0)
    place, apart = write(tmp_path), FRACTIONS.index(min(FRACTIONS))
    trained, held_out = components_of(place, tmp_path / "run", held_out=BETWEEN)
    assert held_out is not None and [row["captions"] for row in held_out.rows] == [CAPTIONS[apart]]
    assert [row["captions"] for row in trained.rows] == [CAPTIONS[n] for n in range(3) if n != apart]
    assert components_of(place, tmp_path / "run")[1] is None


def split_folders(folder: Path) -> Path:
    image_folder(folder).rename(folder / "train")
    folder_of(folder / "validation", [77])
    return folder


def split_shards(folder: Path) -> Path:
    (folder / "train").mkdir()
    shards(folder / "train")
    write_tar(folder / "validation" / "0.tar", [("a.png", PICTURES[1]), ("a.txt", b"x")])
    return folder


def split_parquet(folder: Path) -> Path:
    table().to_parquet(folder / "train.parquet")
    table().select([1]).to_parquet(folder / "validation.parquet")
    return folder


def split_saved(folder: Path) -> Path:
    import datasets

    datasets.DatasetDict({"train": table(), "validation": table().select([1])}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


SPLIT = [split_folders, split_shards, split_parquet, split_saved]


@pytest.mark.parametrize("write", SPLIT, ids=lambda kind: kind.__name__)
def test_a_split_of_its_own_is_used_for_every_kind(tmp_path: Path, write: Any) -> None:
    place = write(tmp_path)
    trained, held_out = components_of(place, tmp_path / "run")
    assert colors_of(trained) == [10, 20, 30]
    assert colors_of(held_out) == [77 if write is split_folders else 20]
    with pytest.raises(InputError, match=r"has a validation split, and data\.held_out is 0\.1; set it to 0") as error:
        components_of(place, tmp_path / "run", held_out=0.1)
    assert "\n" not in str(error.value)


def test_a_split_that_cannot_be_used_is_no_split_that_is_not_there(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "set", [1, 2])
    (place / "validation").mkdir()
    with pytest.raises(InputError, match=r"set/validation has neither metadata\.jsonl nor \.tar files"):
        components_of(place, tmp_path / "run")


def test_of_many_some_are_measured_by(tmp_path: Path) -> None:
    config = DataConfig(folder=str(folder_of(tmp_path / "set", [1])), size=8)
    folder_of(tmp_path / "set" / "validation", list(range(100)))
    chosen = open_held_out(config, tmp_path / "cache", 5)
    assert colors_of(chosen) == [0, 25, 50, 74, 99]


@pytest.mark.parametrize(("share", "problem"), [(0.9, "train on; lower it"), (0.01, "measure by; raise it")])
def test_a_share_that_leaves_a_part_empty_is_refused(tmp_path: Path, share: float, problem: str) -> None:
    colors = [n for n in range(250) if 0.02 < fraction(tmp_path, n) < 0.89][:4]
    place = folder_of(tmp_path / "set", colors)
    with pytest.raises(InputError, match=rf"data\.held_out {share} of 4 pictures leaves none to {problem}$"):
        components_of(place, tmp_path / "run", held_out=share)


def fraction(folder: Path, color: int) -> float:
    Image.new("RGB", (8, 8), (color, 0, 99)).save(folder / "one.png")
    return int(hashlib.sha256((folder / "one.png").read_bytes()).hexdigest(), 16) / 2**256


def test_the_share_is_about_what_was_asked_for() -> None:

    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(20_000)]
    shares = [np.mean([is_held_out(digest, share) for digest in digests]) for share in (0.0, 0.05, 0.5)]
    assert shares == pytest.approx([0.0, 0.05, 0.5], abs=0.01)
    assert all(is_held_out(digest, 0.5) for digest in digests if is_held_out(digest, 0.05))
