"""Stage image_text end to end on a few tiny pictures: it learns, resumes exactly, is looked at, and judges."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from latentdiff.training.check import image_text as check_image_text
from latentdiff.training.config import ImageTextTraining, parse_config
from latentdiff.training.losses.contrastive import calibration_error, contrastive_loss, label_loss, least_loss, ranks
from latentdiff.training.train_image_text import assemble
from torch.nn import functional as F

from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.evaluate.judge import load_judge
from latentdiff.images import open_image, to_tensor
from tests.training.test_stages import SIZE, check_interrupted, pictures, text_folder

LETTERS = "abcdefgh"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write eight pictures, their letters as captions, and a tiny config over them."""
    pictures(tmp_path / "pictures", 8)
    run = {"out": str(tmp_path / "run"), "steps": 4, "batch_size": 8, "precision": "no", "ema_decay": 0.9}
    tree = {
        "stage": "image_text",
        "data": {"folder": str(tmp_path / "pictures"), "size": SIZE},
        "run": run | {"save_every": 2, "log_every": 2, "sample_every": 2},
        "text_encoder": str(text_folder(tmp_path / "text")),
        "model": {"image_size": SIZE, "block_out_channels": [8, 16], "projection_dim": 16},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 1},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.mark.parametrize("weight", [0, 1])
def test_it_learns_which_text_is_of_which_picture(recipe: Path, tmp_path: Path, weight: float) -> None:
    steps = ["run.steps=120", "run.save_every=120", "run.sample_every=120"]
    cli_train(str(recipe), [*steps, f"label_weight={weight}"], False, None)
    judge = load_judge(tmp_path / "run/image_text", text_encoder=tmp_path / "text")
    images = to_tensor([open_image(tmp_path / f"pictures/{number}.png") for number in range(8)])
    fits = judge.images(images) @ judge.texts(list(LETTERS)).T
    assert (fits.argmax(dim=1) == torch.arange(8)).float().mean() >= 0.75
    assert json.loads((tmp_path / "run/image_text.json").read_text()) == {}  # nothing was held out


def test_a_run_that_was_broken_off_ends_like_the_unbroken_one(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + "label_weight: 0.5\n")
    check_interrupted(str(recipe), tmp_path)


def test_held_out_pictures_are_found_among_all_labels(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    (tmp_path / "pictures").rename(tmp_path / "split/train")
    pictures(tmp_path / "split/validation", 3)
    cli_train(str(recipe), [f"data.folder={tmp_path / 'split'}", "label_column=text"], False, None)
    measured = json.loads((tmp_path / "run/image_text.json").read_text())
    assert (measured["held_out_images"], measured["texts"]) == (3, 8)
    assert 0 <= measured["held_out_top1"] <= measured["held_out_top5"] <= 1


def test_a_picture_beside_another_has_no_label(recipe: Path) -> None:
    config = parse_config(yaml.safe_load(recipe.read_text()))
    assert isinstance(config, ImageTextTraining)
    data, _, _ = assemble(config, torch.device("cpu"))
    assert len(data.labels) == len(data.label_texts) == 8
    assert sorted(data.batch(config, 0).labels.tolist()) == list(range(8))
    pairs = [[replace(view, beside=0) for view in views] for views in data.plans]
    assert (replace(data, plans=pairs).batch(config, 0).labels == -1).all()


def test_the_loss_of_labels_is_that_of_the_pictures_that_have_one() -> None:
    torch.manual_seed(0)
    images, labels = (F.normalize(torch.randn(count, 8), dim=1) for count in (4, 6))
    right, scale = torch.tensor([5, -1, 0, 5]), torch.tensor(3.0)
    rows = (3 * images @ labels.T).log_softmax(dim=1)
    expected = -(rows[0, 5] + rows[2, 0] + rows[3, 5]) / 3
    torch.testing.assert_close(label_loss(images, labels, scale, right), expected)
    assert label_loss(images, labels, scale, torch.full((4,), -1)) == 0


def test_a_check_looks_at_everything_and_writes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_image_text, "OVERFIT_STEPS", 60)
    assert main(["train", str(recipe), "--check"]) == 0
    table = capsys.readouterr().out
    for name in ("config", "run folder", "pictures", "held-out pictures", "parameters", "disk", "step", "overfits 8"):
        assert f"\n{name} " in f"\n{table}", name
    rows = {line[:18].strip(): line.split()[-1] for line in table.splitlines()}
    assert rows["overfits 8"] == "ok" and rows["held-out pictures"] == "look"
    assert not (tmp_path / "run").exists()


def test_a_text_may_be_right_for_several_images() -> None:
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(3, 8), dim=1) for _ in range(2))
    right = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]]).bool()  # the last text for the first image too
    logits = 3 * images @ texts.T
    by_image, by_text = -logits.log_softmax(dim=1), -logits.log_softmax(dim=0)
    expected = ((by_image[0, 0] + by_image[0, 2]) / 2 + by_image[1, 1] + by_image[2, 2]) / 3
    expected = expected + (by_text[0, 0] + by_text[1, 1] + (by_text[0, 2] + by_text[2, 2]) / 2) / 3
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(3.0), right), expected / 2)
    assert least_loss(right) == pytest.approx(math.log(2) / 3)
    assert ranks(texts, texts, torch.arange(3)).tolist() == [0, 0, 0]


def test_calibration_compares_confidence_with_how_often_it_is_right() -> None:
    sure = torch.tensor([[9.0, -9.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 0])) == pytest.approx(0, abs=1e-6)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)
    unsure = torch.tensor([0.6, 0.4]).log().expand(10, 2)  # right in six of ten, as it says
    assert calibration_error(unsure, torch.tensor([0] * 6 + [1] * 4)) == pytest.approx(0, abs=1e-6)
    both = torch.cat([sure[:2], unsure])  # each is compared in its own bin: 2 right of 2, 4 of 10
    assert calibration_error(both, torch.tensor([0, 0, *([0] * 4), *([1] * 6)])) == pytest.approx(0.2 * 10 / 12)


def test_captions_of_a_drawing_in_another_style_are_wrong_for_it(recipe: Path) -> None:
    config = parse_config(yaml.safe_load(recipe.read_text()))
    assert isinstance(config, ImageTextTraining)
    data, _, _ = assemble(config, torch.device("cpu"))
    for number, views in enumerate(data.plans):  # all show the same, in one style or another
        style = f"a fox, {'flat' if number % 2 else 'noto'} style"
        data.plans[number] = [replace(view, captions=["a fox", style]) for view in views]
    data.captions.update({"a fox": 0, "a fox, noto style": 1, "a fox, flat style": 2})
    right = data.batch(config, 0).right
    assert right.diagonal().all() and right.any(dim=0).all()
    counts = right.sum(dim=0)
    assert set(counts.tolist()) == {4, 8}  # of those with and without a style


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"text_dim": 3}}, "text_dim follows from the text encoder"),
        ({"model": {"image_size": 15}}, "image_size must be a multiple of"),
        ({"data": {"folder": "x", "size": 16, "crop": "random"}}, "trained on whole squares"),
        ({"run": {"out": "x", "steps": 1, "batch_size": 1}}, "a batch is contrasted with itself"),
    ],
)
def test_configs_that_do_not_fit_are_refused(recipe: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config({**yaml.safe_load(recipe.read_text()), **change})
