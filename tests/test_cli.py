"""The command line: its contract of files, outputs, exit codes and one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentdiff.training.datasets import emoji, near_words
from latentdiff.training.datasets.scenes import build as scenes
from PIL import Image, PngImagePlugin

import latentdiff.commands.generate
from latentdiff import Pipeline, training
from latentdiff.cli import main
from latentdiff.commands import train
from latentdiff.generation.result import read_record
from latentdiff.images import open_image, read_texts, write_png

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def draw(built_model: Path) -> Any:
    """Call `latentdiff generate` with the tiny model and few steps; returns the exit code."""
    return lambda *arguments: main(["generate", "--model", str(built_model), "--steps", "2", *arguments])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(open_image(path))


def test_draws_a_picture_and_says_where(draw: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("a red fox", "-o", "fox.png") == 0
    assert capsys.readouterr() == ("fox.png\n", "")
    assert names(workplace) == ["fox.png"]
    assert pixels("fox.png").shape == (32, 32, 3)
    assert read_texts("fox.png")["parameters"].startswith("a red fox\nSteps: 2, Sampler: Euler a")


def test_same_seed_same_file(draw: Any) -> None:
    assert draw("fox", "--seed", "7", "-o", "a.png") == draw("fox", "--seed", "7", "-o", "b.png") == 0
    assert draw("fox", "-o", "c.png") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes() != Path("c.png").read_bytes()


def test_several_pictures_are_numbered(draw: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("fox", "cat", "-n", "2", "-o", "x.png") == 0
    assert capsys.readouterr().out.split() == ["x.png", "x-2.png", "x-3.png", "x-4.png"]
    assert [read_record(name)["prompt"] for name in ("x.png", "x-4.png")] == ["fox", "cat"]


def test_names_come_from_prompts_and_nothing_is_overwritten(draw: Any, workplace: Path) -> None:
    assert draw("A red fox!", "cat", "-n", "2") == 0
    assert names(workplace) == ["a-red-fox-2.png", "a-red-fox.png", "cat-2.png", "cat.png"]
    before = Path("cat.png").read_bytes()
    assert draw("cat", "--seed", "5") == 0
    assert Path("cat.png").read_bytes() == before
    assert read_record("cat-3.png")["seed"] == 5
    Path("folder").mkdir()
    assert draw("cat", "-o", "folder") == 0
    assert names(workplace / "folder") == ["cat.png"]


def test_json_is_the_last_line_of_stdout(draw: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--sampler",
        "euler",
        "--guidance",
        "3",
        "--size",
        "48x32",
        "--negative",
        "cat",
        "--seed",
        "4",
        "-n",
        "2",
    ]
    assert draw("fox", "-o", "a.png", "--json", *options) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["files"] == ["a.png", "a-2.png"]
    assert report["seeds"] == [4, 5]
    assert report["prompts"] == ["fox", "fox"]
    settings = report["settings"]
    assert (settings["sampler"], settings["guidance_scale"], settings["num_inference_steps"]) == ("euler", 3.0, 2)
    assert (settings["width"], settings["height"], settings["negative_prompt"]) == (48, 32, "cat")
    assert report["token_counts"] == [3, 3]
    assert report["notes"] == []


def test_image_to_image(draw: Any) -> None:
    Image.new("RGB", (64, 32), "red").save("photo.png")
    assert draw("fox", "--image", "photo.png", "--strength", "0.5", "-o", "a.png") == 0
    assert pixels("a.png").shape == (24, 48, 3)
    assert read_record("a.png")["image"]["path"] == "photo.png"


BAD: dict[str, tuple[list[str], int, str]] = {
    "10^6 characters": (["x" * 10**6], 2, "at most 4000 characters, got 1000000"),
    "NUL": (["a\0b"], 2, "NUL"),
    "NaN guidance": (["fox", "--guidance", "nan"], 2, "guidance_scale must be a finite number from 0 to 50"),
    "guidance in words": (["fox", "--guidance", "much"], 2, "--guidance: invalid float value: 'much'"),
    "0 steps": (["fox", "--steps", "0"], 2, "num_inference_steps must be a whole number from 1 to 1000, got 0"),
    "odd size": (["fox", "--size", "500x64"], 2, "width must be a multiple of 8, got 500; try 496 or 504"),
    "size in words": (["fox", "--size", "big"], 2, "--size must be WIDTHxHEIGHT in pixels, got 'big'; try 64x64"),
    "size beyond the model": (["fox", "--size", "4096x4096"], 2, "up to 128"),
    "unknown sampler": (["fox", "--sampler", "eular"], 2, "sampler 'eular' is unknown; did you mean 'euler'"),
    "unknown dtype": (["fox", "--dtype", "float61"], 2, "did you mean 'float16'"),
    "unknown device": (["fox", "--device", "cuda:77"], 2, "device must be one that is here, got 'cuda:77'"),
    "seed below 0": (["fox", "--seed", "-1"], 2, "seed must be a whole number from 0"),
    "no pictures": (["fox", "-n", "0"], 2, "num_images must be"),
    "no such image": (["fox", "--image", "none.png"], 2, "cannot read image 'none.png'"),
    "broken image": (["fox", "--image", "broken.png"], 2, "broken.png is not a PNG, JPEG or WebP"),
    "strength alone": (["fox", "--strength", "0.5"], 2, "got no --image"),
    "no such folder": (["fox", "-o", "none/a.png"], 4, "there is no folder 'none'"),
    "unwritable": (["fox", "-o", "/proc/a.png"], 4, "cannot write /proc/a.png"),
    "not a PNG": (
        ["fox", "-o", "a.gif"],
        2,
        "-o must name a PNG, JPEG or WebP file or a folder, got 'a.gif'; try a.png",
    ),
    "unknown option": (["fox", "--stepz", "3"], 2, "unrecognized arguments: --stepz"),
    "shortened option": (["fox", "--samp", "ddim"], 2, "unrecognized arguments: --samp"),
    "nothing": ([], 2, "PROMPT"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    draw: Any, workplace: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    Path("broken.png").write_bytes(b"\x89PNX")
    arguments, code, message = BAD[name]
    assert draw(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("latentdiff: ")
    assert captured.err.count("\n") <= 2
    assert len(captured.err) < 400
    assert names(workplace) == ["broken.png"]


def test_commands_and_models_with_the_nearest_name(
    built_model: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["genrate", "fox"]) == 2
    assert "did you mean 'generate'" in capsys.readouterr().err
    assert main(["generate", "fox", "--model", str(built_model.with_name("tinny"))]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    assert main(["data", "emojy", "x"]) == 2
    assert "did you mean 'emoji'" in capsys.readouterr().err
    assert names(workplace) == []


def test_refused_models_end_with_3(model_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(1)}, model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert main(["generate", "fox", "--model", str(model_folder)]) == 3
    assert "a zip archive" in capsys.readouterr().err
    assert main(["inspect", str(model_folder)]) == 3
    assert names(workplace) == []


def test_output_is_checked_before_the_model_is_loaded(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Pipeline:
        raise AssertionError("model loaded")

    monkeypatch.setattr(latentdiff.commands.generate, "load", never)
    assert draw("fox", "-o", "none/a.png") == 4
    assert draw("fox", "--sampler", "dimm") == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 4, "cannot write a.png: No space left on device"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "out of memory"),
    ],
)
def test_what_breaks_off_leaves_no_file(
    draw: Any,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    assert draw("fox", "-o", "a.png") == code
    assert message in capsys.readouterr().err
    assert names(workplace) == []


def test_mistakes_of_ours_are_not_hidden(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        draw("fox", "-o", "a.png")


def test_a_file_that_was_named_is_replaced_and_its_numbers_are_not(
    draw: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.png", "x-2.png"):
        Path(name).write_bytes(b"mine")
    assert draw("fox", "-n", "3", "-o", "x.png") == 0
    assert capsys.readouterr().out.split() == ["x.png", "x-3.png", "x-4.png"]
    assert read_record("x.png")["seed"] == 0 and Path("x-2.png").read_bytes() == b"mine"


def test_replay_keeps_earlier_ones_and_compares_with_what_it_replaces(
    draw: Any, built_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw("fox", "-o", "x.png") == 0
    Path("folder").mkdir()
    Path("folder/x-replay.png").write_bytes(b"mine")
    for out in (["x-replay.png"], ["x-replay-2.png"], ["folder/x-replay-2.png", "-o", "folder"]):
        capsys.readouterr()
        assert main(["replay", "x.png", "--model", str(built_model), *out[1:]]) == 0
        assert capsys.readouterr() == (f"{out[0]}\n", "")
    write_png("x.png", Image.new("RGB", (32, 32)), read_texts("x.png"))
    assert main(["replay", "x.png", "--model", str(built_model), "-o", "x.png", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["identical"] is False and "the pixels differ from x.png" in captured.err


def test_replay_makes_the_same_file(draw: Any, built_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sampler", "euler_a", "--guidance", "4", "--negative", "cat", "--size", "40x24", "--seed", "3"]
    assert draw("fox", "cat", "-n", "3", *options, "-o", "x.png") == 0
    capsys.readouterr()
    for name in ("x-2", "x-6"):
        assert main(["replay", f"{name}.png", "--model", str(built_model)]) == 0
        assert capsys.readouterr() == (f"{name}-replay.png\n", "")
        assert Path(f"{name}-replay.png").read_bytes() == Path(f"{name}.png").read_bytes()
    assert main(["replay", "x-2.png", "-o", "again.png", "--json", "--model", str(built_model)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] is True
    assert report["seeds"] == [4]
    assert report["files"] == ["again.png"]


def test_replay_of_image_to_image(
    draw: Any, built_model: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(built_model, "tiny")  # found by its name
    Image.new("RGB", (32, 32), "red").save("photo.png")
    assert draw("fox", "--image", "photo.png", "--strength", "0.5", "-o", "a.png") == 0
    assert main(["replay", "a.png"]) == 0
    assert np.array_equal(pixels("a-replay.png"), pixels("a.png"))
    Image.new("RGB", (32, 32), "blue").save("photo.png")
    capsys.readouterr()
    assert main(["replay", "a.png", "-o", "b.png"]) == 2
    assert "photo.png is no longer the image" in capsys.readouterr().err
    assert main(["replay", "a.png", "-o", "b.png", "--force"]) == 0
    assert "the pixels differ from a.png" in capsys.readouterr().err
    assert not np.array_equal(pixels("b.png"), pixels("a.png"))


def test_inpainting_and_its_replay(
    draw: Any, built_model: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(built_model, "tiny")  # found by its name
    Image.new("RGB", (32, 32), "red").save("photo.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save("mask.png")
    assert draw("fox", "--image", "photo.png", "--mask", "mask.png", "-o", "a.png") == 0
    assert (pixels("a.png")[:, :16] == pixels("photo.png")[:, :16]).all()
    assert main(["replay", "a.png"]) == 0
    assert np.array_equal(pixels("a-replay.png"), pixels("a.png"))
    Image.new("L", (32, 32), 255).save("mask.png")
    capsys.readouterr()
    assert main(["replay", "a.png", "-o", "b.png"]) == 2
    assert "mask.png is no longer the mask" in capsys.readouterr().err
    assert draw("fox", "--mask", "mask.png") == 2
    assert "--mask says which part of --image is drawn anew, got no --image" in capsys.readouterr().err


def test_replay_refuses_another_model(
    draw: Any, model_folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw("fox", "-o", "a.png") == 0
    settings = json.loads((model_folder / "vae" / "config.json").read_text())
    (model_folder / "vae" / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.7}))
    capsys.readouterr()
    assert main(["replay", "a.png", "--model", str(model_folder)]) == 2
    assert "was made by model" in capsys.readouterr().err
    assert names(workplace) == ["a.png"]
    assert main(["replay", "a.png", "--model", str(model_folder), "--force"]) == 0


def test_replay_refuses_what_it_cannot_repeat(
    pipe: Pipeline, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = torch.zeros(1, 4, 8, 8)
    pipe("fox", latents=noise, num_inference_steps=2).save("noise.png")
    pipe("fox", image=Image.new("RGB", (32, 32)), num_inference_steps=2).save("memory.png")
    Image.new("RGB", (4, 4)).save("plain.png")
    for name, message in (
        ("noise", "from latents that were passed in"),
        ("memory", "an image in memory"),
        ("plain", "must hold latentdiff's settings"),
        ("none", "cannot read image"),
    ):
        assert main(["replay", f"{name}.png"]) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 10**9},
        {"batch_index": 7},
        {"batch_index": None},
        {"seed": "x"},
        {"image": "photo.png"},
        {"model": 5},
        {"model_hash": None},
        {"dtype": ["float32"]},
        {"device": "fpga"},
        {"prompt": ""},
    ],
)
def test_replay_of_a_forged_record_is_refused(
    pipe: Pipeline, workplace: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    record = pipe("fox", num_inference_steps=2).record(0) | change
    texts = PngImagePlugin.PngInfo()
    texts.add_text("latentdiff", json.dumps(record))
    Image.new("RGB", (32, 32)).save("forged.png", pnginfo=texts)
    assert main(["replay", "forged.png"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert names(workplace) == ["forged.png"]


def test_plan_prints_the_table(built_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--sampler", "euler", "--steps", "3", "--model", str(built_model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("euler, 3 rows, 1 slot;")
    assert len(lines) == 5
    assert main(["plan", "--sampler", "ddpm", "--steps", "4", "--model", str(built_model), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert len(table["sigmas"]) == len(table["timesteps"]) == len(table["matrices"]) == 4
    assert table["noise"][0][0] > 0
    assert main(["plan", "--sampler", "eular", "--model", str(built_model)]) == 2


def test_inspect(draw: Any, built_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built_model)]) == 0
    assert "prediction_type: v_prediction\n" in capsys.readouterr().out
    assert main(["inspect", str(built_model / "vae" / "diffusion_pytorch_model.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "VAE"
    assert draw("fox", "-o", "a.png") == 0
    capsys.readouterr()
    assert main(["inspect", "a.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "fox"
    assert main(["inspect", "none"]) == 2


def test_train_and_data_hand_over_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(train, "train", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(train, "check", lambda *arguments: calls.append(("check", *arguments)))
    monkeypatch.setattr(emoji, "build", lambda *arguments, sources: calls.append((*arguments, sources)) or {})
    monkeypatch.setattr(scenes, "add_scenes", lambda *arguments: calls.append(("scenes", *arguments)))
    monkeypatch.setattr(near_words, "add_near_words", lambda *arguments: calls.append(("words", *arguments)))
    assert main(["train", "c.yaml", "--set", "a.b=1", "--set", "c=2", "--resume", "--out", "runs/x"]) == 0
    assert main(["train", "c.yaml", "--check", "--out", "runs/x"]) == 0
    assert main(["data", "emoji", "out", "--size", "32"]) == 0
    assert main(["data", "emoji", "out", "--scenes", "7", "--near-words"]) == 0
    expected: list[tuple[Any, ...]] = [("c.yaml", ["a.b=1", "c=2"], True, "runs/x"), ("check", "c.yaml", [], "runs/x")]
    assert calls == [*expected, ("out", 32, None), ("out", 64, None), ("words", "out"), ("scenes", "out", 7)]
    assert main(["data", "emoji", "out", "--scenes", "0"]) == 2
    assert len(calls) == 6  # nothing is drawn before that is refused


def test_recipes_of_an_installed_package_are_found_by_plain_names_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workplace: Path
) -> None:
    packaged = tmp_path / "training" / "configs" / "emoji.yaml"
    packaged.parent.mkdir(parents=True)
    packaged.write_text("")
    calls: list[str] = []
    monkeypatch.setattr(training, "__file__", str(tmp_path / "training" / "__init__.py"))
    monkeypatch.setattr(train, "train", lambda config, *rest: calls.append(config))
    mistyped = "my-experiments/2024/emoji.yaml"  # is no recipe of ours, whatever its last name
    for name in ("configs/emoji.yaml", "emoji.yaml", "other.yaml", mistyped):
        assert main(["train", name]) == 0
    Path("emoji.yaml").write_text("")
    assert main(["train", "emoji.yaml"]) == 0
    assert calls == [str(packaged), str(packaged), "other.yaml", mistyped, "emoji.yaml"]


def test_help_lists_the_commands_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("generate", "replay", "plan", "inspect", "train", "data"))


def test_a_reader_that_leaves_early_is_no_error(built_model: Path) -> None:
    command = [sys.executable, "-m", "latentdiff", "plan", "--steps", "1000", "--model", str(built_model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()
