"""Memorisation: copies are found, the yardstick's share is kept, and what cannot be measured is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.evaluate import memorised as module
from latentdiff.evaluate.memorised import memorised, nearest, quantile_of, share_below
from latentdiff.images import open_image, open_stored, read_texts, to_tensor
from latentdiff.marks import COMPOSITE, source_type_of
from tests.evaluate.small import evaluation, images, reference
from tests.evaluate.test_features import dinov2_folder  # noqa: F401  (a fixture)
from tests.models.test_pixels import components as pixel_model
from tests.models.tiny import noise_picture


def test_nearest_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    queries, others = rng.standard_normal((7, 5)), rng.standard_normal((23, 5))
    others[20] = queries[3]
    blocks = iter({"plain": others[first : first + 4]} for first in range(0, 23, 4))
    found = nearest({("plain", "some"): queries}, blocks)["plain", "some"]
    distances = np.sqrt(np.square(queries[:, None] - others).mean(axis=2))
    assert np.array_equal(found.places, distances.argmin(axis=1))
    assert found.distances == pytest.approx(distances.min(axis=1))
    assert found.places[3] == 20 and found.distances[3] == 0


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """Both sets of one distribution: the share below the 5 % quantile is 5 %, and the quantile is known."""
    rng = np.random.default_rng(1)
    shares, quantiles, mean = 0, 0, 0.0
    for _ in range(1000):
        values, others = rng.uniform(0, 1, 200), rng.uniform(0, 1, 200)
        found, quantile = share_below(values, others, 0.05), quantile_of(others, 0.05)
        shares += found.low <= 0.05 <= found.high
        quantiles += quantile.low <= 0.05 <= quantile.high
        mean += found.value / 1000
    assert 930 <= shares <= 970 and 930 <= quantiles <= 970, (shares, quantiles)
    assert mean == pytest.approx(0.05, abs=0.002)  # a quantile at rank 1 + (n - 1) q makes it 0.055


def test_copies_are_found_in_every_space(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)
    training, held_out = images(60, seed=1), images(40, seed=2)
    generated = torch.cat([training[[41, 5, 20]], images(9, seed=3)])
    figures = memorised(evaluation(tmp_path / "out", pipe.components, held_out, training, generated))
    found = {figure.name: figure for figure in figures}
    for space in ("pixels", "latents", "features"):
        figure = found[f"memorised/{space}"]
        assert 3 / 12 <= figure.estimate.value <= 6 / 12 and figure.estimate.n == 12
        assert list(figure.items)[:3] == ["0 nearest 41", "1 nearest 5", "2 nearest 20"]
        assert max(list(figure.items.values())[:3]) < 1e-6 < min(list(figure.items.values())[3:])
        assert figure.floor is not None and figure.floor <= 0.2
        assert figure.ceiling is not None and figure.ceiling > 0.8
        assert (figure.protocol["n_training"], figure.protocol["n_held_out"]) == (60, 40)
        picture = to_tensor([open_image(tmp_path / f"out/memorised-{space}.png")])[0]  # (3, 2 * 32, 8 * 32)
        assert picture.shape == (3, 64, 256)
        assert torch.equal(picture[:, :32, :96], picture[:, 32:, :96])  # the three copies come first
        assert not torch.equal(picture[:, :32, 96:], picture[:, 32:, 96:])
        assert read_texts(tmp_path / f"out/memorised-{space}.png")["distances"].startswith("0, 0, 0, 0.")
        assert source_type_of(open_stored(tmp_path / f"out/memorised-{space}.png")) == COMPOSITE  # real ones below
    quantile = found["memorised/pixels/distance_50%"]
    assert quantile.estimate.low < quantile.estimate.value < quantile.estimate.high and quantile.better is None
    assert quantile.floor is not None and 0.5 < quantile.estimate.value / quantile.floor < 1.2


def test_large_pictures_are_compared_at_a_smaller_size(tmp_path: Path) -> None:
    training = images(30, seed=1, side=96)
    asked = evaluation(tmp_path, None, images(20, seed=2, side=96), training, training[:4])
    figures = memorised(asked)
    assert {figure.name.split("/")[1] for figure in figures} == {"pixels", "features"}  # no model, no latents
    assert figures[0].estimate.value == 1 and figures[0].protocol["resize"] == "bilinear antialiased to 64"


def test_a_model_of_pixels_has_no_latents(tmp_path: Path) -> None:
    training = images(30, seed=1, side=8)
    figures = memorised(evaluation(tmp_path, pixel_model(3), images(20, seed=2, side=8), training, training[:2]))
    assert {figure.name.split("/")[1] for figure in figures} == {"pixels", "features"}


def test_what_cannot_be_measured_is_said_in_one_line(tmp_path: Path) -> None:
    training, some = images(30, seed=1), images(5, seed=3)
    for test, trained_on, generated, message in (
        (images(19, seed=2), training, some, "at least 20 held-out pictures, got 19"),
        (images(1, seed=2), training, some, "at least 20 held-out pictures, got 1"),
        (images(20, seed=2), None, some, "needs real pictures of the split train"),
        (training, training, some, "5% of the test pictures or more are training pictures too"),
        (images(20, seed=2), training, images(5, side=16), "of one size, got 16x16 beside 32x32"),
        (images(20, seed=2), images(30, side=16), some, "of one size, got 16x16 beside 32x32"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            memorised(evaluation(tmp_path, None, test, trained_on, generated))
        assert "\n" not in str(caught.value)
    asked = evaluation(tmp_path, None, training, training, some)
    asked.references = {"test": reference(training, "train"), "train": reference(training, "train")}
    with pytest.raises(InputError, match="beside those trained on, got both of the split train"):
        memorised(asked)


def write_split(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        noise_picture(32, 32, seed=seed + number).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a fox {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def test_the_command_reads_the_pictures_that_were_trained_on(
    built_model: Path,
    dinov2_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_split(tmp_path / "data/train", 24, 0)
    write_split(tmp_path / "data/test", 20, 100)
    call = ["evaluate", str(built_model), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--n", "20"]
    call += ["--metrics", "memorised", "--features", f"dinov2:{dinov2_folder}"]
    assert main([*call, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures[0]["name"] == "memorised/pixels" and figures[0]["protocol"]["n_training"] == 24
    assert len(figures) == 12 and open_image(tmp_path / "out/memorised-latents.png").size == (256, 64)
    assert main([*call, "--split", "train"]) == 2
    assert "needs real pictures of the split train" in capsys.readouterr().err
