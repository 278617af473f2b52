"""A tuned sampler at every door: command line, Python, replay, plan, sweep; what it cannot do, and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.checkpoints.saver import write_json
from latentdiff.checkpoints.tuned_sampler import FILE
from latentdiff.cli import main
from latentdiff.diffusion.tuned import TunedSampler, TunedTable, schedule_digest
from latentdiff.errors import InputError, ModelConfigError, ModelFormatError
from latentdiff.generation.result import read_record
from tests.training.test_stages import pictures


def table(steps: int, guidance_scale: float = 4.0) -> TunedTable:
    """Return a table whose numbers nobody tuned."""
    sigmas = tuple(20.0 * 0.3**index for index in range(steps))
    rows = tuple((0.8,) if index == 0 else (1.1, -0.3) for index in range(steps))
    return TunedTable(
        sigmas, tuple(900.0 / (n + 1) for n in range(steps)), (0.2,) * steps, rows, guidance_scale, 0.1, 1
    )


@pytest.fixture
def tuned_model(built_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a tuned sampler of 2 and 3 steps."""
    components = load_pipeline(built_model)
    tuned = TunedSampler(schedule_digest(components.schedule), {}).with_table(table(2)).with_table(table(3))
    save_pipeline(replace(components, tuned=tuned), tmp_path / "tuned", dtype=None)
    return tmp_path / "tuned"


def test_every_door_draws_the_same(tuned_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Command line, Python, replay; the record has the hash of the table."""
    options = ["--model", str(tuned_model), "--sampler", "tuned", "--steps", "3", "--guidance", "4", "--seed", "5"]
    file = tmp_path / "fox.png"
    assert main(["generate", "a red fox", *options, "-o", str(file)]) == 0
    pipe = Pipeline.from_pretrained(tuned_model, device="cpu")
    how: dict[str, Any] = {"sampler": "tuned", "guidance_scale": 4, "seed": 5}
    drawn = pipe("a red fox", num_inference_steps=3, **how)
    assert drawn.images[0].tobytes() == Image.open(file).convert("RGB").tobytes()
    assert drawn.settings["tuned_sampler"] == read_record(file)["tuned_sampler"] == table(3).digest
    other = pipe("a red fox", num_inference_steps=3, guidance_scale=4, seed=5, sampler="dpmpp_2m")
    assert "tuned_sampler" not in other.settings and other.images[0].tobytes() != drawn.images[0].tobytes()
    call = ["replay", str(file), "--model", str(tuned_model), "-o", str(tmp_path / "again.png"), "--json"]
    capsys.readouterr()
    assert main(call) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["identical"] is True
    tree = json.loads((tuned_model / FILE).read_text())
    tree["tables"][1]["of_x"][0] += 0.01
    write_json(tuned_model / FILE, tree)
    assert main(call) == 2
    assert "is no longer the tuned sampler this picture was made with" in capsys.readouterr().err
    assert main([*call, "--force"]) == 0


def test_a_saved_copy_keeps_it_and_a_model_without_takes_it_away(tuned_model: Path, built_model: Path) -> None:
    pipe = Pipeline.from_pretrained(tuned_model, device="cpu")
    pipe.save_pretrained(tuned_model.parent / "copy")
    copied = Pipeline.from_pretrained(tuned_model.parent / "copy", device="cpu").components.tuned
    assert copied == pipe.components.tuned
    Pipeline.from_pretrained(built_model, device="cpu").save_pretrained(tuned_model)
    with pytest.raises(InputError, match="tuned sampler takes no number of steps, got 3"):
        Pipeline.from_pretrained(tuned_model, device="cpu")("a", sampler="tuned", num_inference_steps=3)


def test_image_to_image_and_a_second_pass(tuned_model: Path) -> None:
    pipe = Pipeline.from_pretrained(tuned_model, device="cpu")
    how: dict[str, Any] = {"sampler": "tuned", "num_inference_steps": 3, "guidance_scale": 4}
    picture = pipe("a", **how).images[0]
    assert pipe("a", image=picture, strength=0.5, **how).images[0].size == picture.size
    assert pipe("a", hires=2, **how).images[0].size == (64, 64)
    box = [8, 8, 24, 24]
    kept = pipe("a", image=picture, mask=box, **how).images[0]
    assert kept.crop((0, 0, 32, 8)).tobytes() == picture.crop((0, 0, 32, 8)).tobytes()


def test_another_guidance_is_remarked_upon(tuned_model: Path) -> None:
    pipe = Pipeline.from_pretrained(tuned_model, device="cpu")
    with pytest.warns(RuntimeWarning, match="was tuned at guidance 4, got 7.5"):
        pipe("a", sampler="tuned", num_inference_steps=2)


def test_what_a_tuned_sampler_cannot_do(
    tuned_model: Path, built_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each; what is wrong with any model is refused before one is loaded."""
    draw = ["generate", "a", "--sampler", "tuned", "--model"]
    for call, expected in (
        ([*draw, str(tuned_model)], "tuned sampler takes 2, 3 steps, got 25; choose those, or dpmpp_2m"),
        (
            [*draw, str(built_model), "--steps", "2"],
            "this model has no tuned sampler; make one with `latentdiff distill",
        ),
        ([*draw, "no-such-model", "--sigmas", "5,1"], "has steps of its own, got sigmas by hand"),
        ([*draw, "no-such-model", "--eta", "0.5"], "has steps of its own, got eta 0.5"),
        ([*draw, "no-such-model", "--resampling", "3"], "has steps of its own, got resampling 3"),
        (["plan", "--sampler", "tuned", "--model", str(built_model)], "has no tuned sampler"),
        (["plan", "--sampler", "tuned", "--steps", "4", "--model", str(tuned_model)], "takes 2, 3 steps, got 4"),
    ):
        assert main(call) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1
    assert main(["plan", "--sampler", "tuned", "--steps", "3", "--model", str(tuned_model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sigmas"] == pytest.approx(table(3).sigmas)


def test_a_sweep_is_refused_before_anything_is_drawn(
    tuned_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pictures(tmp_path / "pictures", 8)
    call = ["evaluate", str(tuned_model), "--data", str(data), "--split", "train", "--metrics", "kid", "--n", "8"]
    call += ["--features", "latents", "--sweep", "sampler=dpmpp_2m,tuned", "--out", str(tmp_path / "report")]
    assert main([*call, "--sweep", "steps=2,4"]) == 2
    assert "takes 2, 3 steps, got 4" in capsys.readouterr().err
    assert not list((tmp_path / "report").rglob("*.png"))
    assert main([*call, "--sweep", "steps=2", "--guidance", "4", "--json"]) == 0
    trees = json.loads(capsys.readouterr().out.splitlines()[-1])["sweep"]
    hashes = [tree.get("tuned_sampler") or tree.get("subject", {}).get("tuned_sampler") for tree in trees]
    assert hashes == [None, table(2).digest]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda tree: tree.pop("schedule"), ModelFormatError, "has no schedule"),
        (lambda tree: tree.update(more=1), ModelConfigError, "unknown key 'more'; choose one of schedule, tables"),
        (lambda tree: tree.update(tables={}), ModelFormatError, "a list as tables"),
        (lambda tree: tree.update(tables=[3]), ModelFormatError, "a table as an object, got 3"),
        (lambda tree: tree["tables"][0].pop("of_x"), ModelFormatError, "has no of_x"),
        (lambda tree: tree["tables"][0].update(of_x=3), ModelFormatError, "expected lists of numbers"),
        (lambda tree: tree["tables"][0].update(of_estimates=[1, 2]), ModelFormatError, "expected lists of numbers"),
        (lambda tree: tree["tables"][0].update(sigmas=[1.0, 2.0]), ModelFormatError, "sigmas must fall"),
        (lambda tree: tree["tables"][0].update(sigmas=[1.0, {}]), ModelFormatError, "must be numbers"),
    ],
)
def test_a_damaged_file_is_refused(tuned_model: Path, change: Any, error: type[Exception], message: str) -> None:
    tree = json.loads((tuned_model / FILE).read_text())
    change(tree)
    write_json(tuned_model / FILE, tree)
    with pytest.raises(error, match=message) as raised:
        load_pipeline(tuned_model)
    assert FILE in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_no_json_or_of_another_model(tuned_model: Path) -> None:
    whole = (tuned_model / FILE).read_text()
    (tuned_model / FILE).write_text(whole[: len(whole) // 2])
    with pytest.raises(ModelFormatError, match="expected JSON"):
        load_pipeline(tuned_model)
    (tuned_model / FILE).write_text(whole.replace('"schedule": "', '"schedule": "0'))
    with pytest.raises(InputError, match="made for another noise schedule or prediction than this model's"):
        Pipeline.from_pretrained(tuned_model, device="cpu")("a", sampler="tuned", num_inference_steps=2)
