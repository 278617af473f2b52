"""The sample pictures in assets/ are a captioned folder, for our trainer and for `datasets` alike."""

from pathlib import Path

import pytest
from latentdiff.training.config import DataConfig
from latentdiff.training.data.dataset import load_images

SAMPLE = Path(__file__).parents[2] / "assets" / "sample"


def test_sample_has_64_captioned_pictures_with_licences() -> None:
    data = load_images(DataConfig(folder=str(SAMPLE), size=64))
    assert len(data) == 64 and not data.skipped
    assert all(len(row["captions"]) >= 3 and row["license"] and row["author"] for row in data.rows)
    assert len({row["style"] for row in data.rows}) == 6


def test_datasets_reads_it_as_an_imagefolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(SAMPLE), cache_dir=str(tmp_path), split="train")
    assert len(loaded) == 64
    assert "fox" in " ".join(loaded["text"])
    assert loaded[0]["image"].size == (64, 64)
