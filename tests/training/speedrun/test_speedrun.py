"""Whole speedruns of tiny models: every kind of picture, every interruption, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from latentdiff.training.monitor import export
from latentdiff.training.networks import parts
from latentdiff.training.speedrun import begin, measure, recipes, run, survey, table
from latentdiff.training.speedrun.machine import Machine
from latentdiff.training.speedrun.plan import Costs
from latentdiff.training.speedrun.run import Wish, speedrun
from latentdiff.training.speedrun.survey import share_of_strange_words
from PIL import Image

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.errors import InputError, StorageError
from latentdiff.evaluate import Request as WholeRequest
from latentdiff.images import open_image
from latentdiff.training import train_diffusion
from tests.training.test_stages import pictures

AUTOENCODER = {
    "stage": "autoencoder",
    "data": {"folder": "x", "size": 16, "keep": {"variant": [""]}},
    "run": {"out": "x", "steps": 9, "batch_size": 4},
    "model": {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "optimizer": {"learning_rate": 0.003},
}
UNET = {
    "stage": "diffusion",
    "data": {"folder": "x", "size": 16, "keep": {"variant": [""]}},
    "run": {"out": "x", "steps": 9, "batch_size": 4},
    "autoencoder": "x",
    "model": {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    },
    "schedule": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "optimizer": {"learning_rate": 0.003},
}
MINUTES = 0.3


class Clock:
    """A second passes whenever somebody looks at it."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built_model: Path) -> Iterator[None]:
    """Make everything small: recipes, table, embedded model; a step takes a second of a clock that nobody waits for."""
    AcceleratorState._reset_state(True)
    place = tmp_path / "recipes"
    place.mkdir()
    (place / "emoji-autoencoder.yaml").write_text(yaml.safe_dump(AUTOENCODER))
    (place / "emoji-diffusion.yaml").write_text(yaml.safe_dump(UNET))
    monkeypatch.setattr(recipes, "find_recipe", lambda name: place / name)
    size = replace(table.LATENTS[0], name="latents of 16 px", side=16, least=16, least_autoencoder=4)
    monkeypatch.setattr(table, "LATENTS", (size,))
    for name, value in {"STARTING": 0.0, "SPARE": 0.0, "GRIDS": 1, "DRAWING": 1, "LEAST_FURTHER": 16}.items():
        monkeypatch.setattr(table, name, value)
    monkeypatch.setattr(
        table, "of_pixels", lambda side: table.Size(f"pixels, {side} px", side, "emoji-diffusion.yaml", 9)
    )
    monkeypatch.setattr(table, "BATCHES", (4,))
    machine = Machine("a processor", "cpu", 1, 2**34, 1e9, 1e9, 0.0)
    monkeypatch.setattr(run, "measure_machine", lambda *_: machine)
    for module in (begin, run):
        monkeypatch.setattr(module, "costs_of", lambda *_: Costs(0.25, 0.25, 0.0, 0.0))
    for module in (begin, measure):
        monkeypatch.setattr(module, "EMBEDDED", str(built_model))
    monkeypatch.setattr(begin, "LEAST_PSNR", 0.0)
    for other in (survey, parts):
        monkeypatch.setattr(other, "embedded_model", lambda: built_model)
    monkeypatch.setattr(export, "show_process", lambda *_: None)
    monkeypatch.setattr(measure, "Request", lambda *given, settings, **more: Request(settings, *given, **more))
    yield
    AcceleratorState._reset_state(True)


def Request(settings: dict[str, Any], *given: Any, **more: Any) -> Any:  # noqa: N802
    return WholeRequest(*given, settings={**settings, "num_inference_steps": 2}, **more)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_model", lambda *_: [])


def plain(folder: Path, count: int, side: int = 16) -> Path:
    """Write pictures without captions."""
    pictures(folder, count)
    (folder / "metadata.jsonl").unlink()
    for file in folder.glob("*.png"):
        Image.open(file).resize((side, side)).save(file)
    return folder


def started(folder: Path, out: Path, **more: Any) -> Path:
    return speedrun(Wish(str(folder), MINUTES, **more), str(out), Clock())


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "speedrun.json").read_text())


@pytest.mark.long
def test_small_pictures_without_captions_become_a_model_that_needs_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = started(plain(tmp_path / "pictures", 12), tmp_path / "out").read_text()
    assert record_of(tmp_path / "out")["facts"]["size"] == "pixels, 16 px"
    for said in ("draws without a prompt", "What it draws", "U-Net: loss", "kid", "were trained on", "--resume"):
        assert said in page
    assert "<script" not in page and 'src="http' not in page
    png = tmp_path / "one.png"
    assert main(["generate", "--model", str(tmp_path / "out/model"), "--steps", "2", "-o", str(png)]) == 0
    assert open_image(png).size == (16, 16)


@pytest.mark.long
def test_captioned_pictures_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SMALL_SIDE", 8)
    out = tmp_path / "out"
    page = started(pictures(tmp_path / "pictures", 12), out, from_nothing=True)
    stages = record_of(out)["stages"]
    assert [*stages] == ["look", "autoencoder", "unet", "evaluation"] and all(one["done"] for one in stages.values())
    assert stages["unet"]["steps"] >= 8 and stages["autoencoder"]["steps"] >= 4
    for said in ("What the autoencoder gives back", "autoencoder: loss", "neighbours", "a new model was asked for"):
        assert said in page.read_text()
    made = (out / "model/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert started(tmp_path / "pictures", out, from_nothing=True) == page  # all is done, and nothing is done again
    assert (out / "model/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(InputError, match="holds a speedrun with from nothing True, asked for False"):
        started(tmp_path / "pictures", out)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("captioned", [True, False])
def test_larger_pictures_are_learnt_by_the_embedded_model(
    captioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    if captioned:
        monkeypatch.setattr(table, "SMALL_SIDE", 8)
        pictures(folder, 12)
    else:
        plain(folder, 12, side=48)
    page = started(folder, out).read_text()
    facts = record_of(out)["facts"]
    assert facts["size"] == "the embedded model" and "by a model that can draw already" in page
    pipe = Pipeline.from_pretrained(out / "model", device="cpu")
    assert pipe.components.reads_text is captioned
    assert pipe("a" if captioned else "", num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.usefixtures("unmeasured")
def test_three_pictures_work(tmp_path: Path) -> None:
    page = started(plain(tmp_path / "pictures", 3), tmp_path / "out").read_text()
    assert "3 pictures are learnt by heart" in page and "3 pictures are too few to measure by" in page


@pytest.mark.usefixtures("unmeasured")
def test_one_caption_for_all(tmp_path: Path) -> None:
    page = started(plain(tmp_path / "pictures", 5), tmp_path / "out", caption="a")
    assert "All pictures have one caption" in page.read_text()
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["data"]["captions"] == ["a"] and config["text_encoder"] == "embedded"


@pytest.mark.usefixtures("unmeasured")
def test_emoji_are_drawn_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def build(out: Path, size: int) -> None:
        sizes.append(size)
        pictures(out, 6)
        rows = [json.loads(line) | {"variant": ""} for line in (out / "metadata.jsonl").read_text().splitlines()]
        (out / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(run, "build", build)
    started(Path("emoji"), tmp_path / "out")
    assert sizes == [16] and [*record_of(tmp_path / "out")["stages"]][:2] == ["look", "data"]
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["data"]["keep"] == {"variant": [""]} and config["samples"]["prompts"] == recipes.EMOJI_PROMPTS


def test_without_npm_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["speedrun", "emoji", "--out", str(tmp_path / "out")]) == 2
    assert "is fetched with npm, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class StoppedError(Exception):
    """Somebody ended the process."""


@pytest.mark.long
@pytest.mark.parametrize("end", [KeyboardInterrupt, StoppedError])
def test_it_goes_on_after_an_interruption_at_every_stage(
    end: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each part."""
    monkeypatch.setattr(table, "SMALL_SIDE", 8)
    folder, out, begun = pictures(tmp_path / "pictures", 12), tmp_path / "out", 0
    parts = ("survey", "choose_model", "plan", "train_autoencoder", "train_diffusion", "write_report")

    def broken(part: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            if after:
                part(*given)
            raise end

        return call

    monkeypatch.setattr(measure, "measure_model", lambda *_: [])
    for part in parts:
        for after in (False, True):
            with monkeypatch.context() as patch, pytest.raises(end) as stopped:
                patch.setattr(run, part, broken(getattr(run, part), after))
                started(folder, out, from_nothing=True)
            begun += 1
            if end is KeyboardInterrupt:
                assert "the same command goes on" in str(stopped.value)
    assert begun == 12
    assert started(folder, out, from_nothing=True).is_file()
    assert all(stage["done"] for stage in record_of(out)["stages"].values())


@pytest.mark.usefixtures("unmeasured")
def test_a_signal_between_two_steps_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, folder = run.train_diffusion, plain(tmp_path / "pictures", 6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="done: look; the same command goes on"):
        patch.setattr(
            run, "train_diffusion", lambda config, resume, stop: train(config, resume, lambda done: done == 3)
        )
        started(folder, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000003"]
    started(folder, tmp_path / "out")
    assert (tmp_path / "out/model/model_index.json").is_file()


@pytest.mark.usefixtures("unmeasured")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost, and the same command goes on."""
    folder, out = plain(tmp_path / "pictures", 6), tmp_path / "out"
    monkeypatch.setattr(run.time, "monotonic", Clock())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "events.out")

    def no_space(*_: Any) -> None:
        raise StorageError("could not save step-00000004: no space left; free space, then go on with --resume")

    call = ["speedrun", str(folder), "--out", str(out), "--minutes", str(MINUTES)]
    with monkeypatch.context() as patch:
        patch.setattr(run, "train_diffusion", full)
        assert main(call) == 4
    assert "no space left for events.out; free some, then give the same command again" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(train_diffusion, "save_run", no_space)
        assert main(call) == 4
    assert "free space, then give the same command again" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_report", lambda *_: (_ for _ in ()).throw(StorageError("cannot write report.html")))
        assert main(call) == 4
    assert main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == str(out / "model")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    folder, out = plain(tmp_path / "pictures", 6), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match=r"holds something else \('thesis.txt'\); choose another --out"):
        started(folder, out)
    (out / "thesis.txt").unlink()
    (out / "speedrun.json").write_text('{"subject": 3}')
    with pytest.raises(InputError, match="is damaged; choose another --out"):
        started(folder, out)


@pytest.mark.usefixtures("unmeasured")
def test_pictures_that_have_changed_are_another_speedrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = plain(tmp_path / "pictures", 6), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(run, "train_diffusion", lambda *_: (_ for _ in ()).throw(StoppedError))
        started(folder, out)
    Image.new("RGB", (16, 16), "red").save(folder / "0.png")
    with pytest.raises(InputError, match="have changed since the speedrun in"):
        started(folder, out)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_that_are_no_time(minutes: float) -> None:
    with pytest.raises(InputError, match="--minutes must be above 0 and at most 10080"):
        Wish("pictures", minutes)


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="there is no file or folder"):
        started(tmp_path / "none", out)
    with pytest.raises(InputError, match=r"are too few here: the smallest model, pixels, 16 px, needs 1"):
        speedrun(Wish(str(plain(tmp_path / "pictures", 6)), 0.05), str(out), Clock())
    assert not out.exists()
    with pytest.raises(InputError, match="emoji have captions of their own"):
        Wish("emoji", caption="a picture")


def test_captions_of_other_languages_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from latentdiff.checkpoints import embedded_model

    monkeypatch.setattr(survey, "embedded_model", embedded_model)
    english = ["a drawing of a fox in the grass", "a sleeping cat on the sofa", "an old house beside a lake"]
    german = ["ein roter Fuchs auf der Wiese", "eine Katze, die auf dem Sofa schläft", "ein altes Haus am See"]
    japanese = ["赤いキツネ", "木の下の猫"]
    assert share_of_strange_words(english) < survey.STRANGE < share_of_strange_words(german)
    assert share_of_strange_words(japanese) > survey.STRANGE and share_of_strange_words([]) == 0.0
