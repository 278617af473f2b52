"""Paths that name nothing a file system can have, at every command that takes one: one line, never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from latentdiff.training.monitor.trackers import TensorBoard

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.devices import resolve_dtype
from latentdiff.engine.attention import find_attention
from latentdiff.errors import InputError, StorageError
from latentdiff.generation.result import METADATA_KEY, read_record
from latentdiff.images import open_image, write_png
from tests.training.test_stages import pictures

COMMANDS = {
    "generate": ["-o PLACE.png", "--model PLACE", "--lora PLACE", "--embedding PLACE", "--vae PLACE", "--image PLACE"],
    "convert": ["PLACE out", "MODEL PLACE", "MODEL PLACE.safetensors", "MODEL out --variant-of PLACE"],
    "export": ["PLACE out", "MODEL PLACE"],
    "replay": ["PLACE.png"],
    "upscale": ["PLACE.png"],
    "inspect": ["PLACE", "PLACE.png", "PLACE.safetensors"],
    "train": ["PLACE", "PLACE --check", "PLACE.yaml"],
    "finetune": ["PLACE --model MODEL --out run", "none --model MODEL --out PLACE"],
    "teach": ["PLACE --data none --out run", "MODEL --data PLACE --out run", "MODEL --data none --out PLACE"],
    "distill": ["PLACE --data none --out run", "MODEL --data PLACE --out run", "MODEL --data none --out PLACE"],
    "speedrun": ["PLACE", "PLACE --out run", "none --out PLACE", "emoji --out PLACE"],
    "data": ["digits PLACE", "emoji PLACE"],
    "evaluate": ["PLACE --data none", "MODEL --data PLACE"],
    "bench": ["--model PLACE"],
    "ui": ["--port 0 --model PLACE"],
    "serve": ["--model PLACE", "--token-file PLACE", "--model MODEL --token of-sixteen-and-more --host PLACE"],
}
CALLS = [f"{command} {rest}" for command, all_of_it in COMMANDS.items() for rest in all_of_it]


@pytest.mark.parametrize("place", ["a" * 300, "a/" * 2500 + "a", "a\0b"], ids=["long name", "long path", "NUL"])
@pytest.mark.parametrize("call", CALLS)
def test_a_place_that_cannot_be_is_one_line(
    call: str,
    place: str,
    built_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("PLACE", place).replace("MODEL", str(built_model)) for word in call.split()]
    if words[0] == "generate":
        words += ["fox", *(() if "--model" in words else ("--model", str(built_model)))]
    code = main(words)
    said = capsys.readouterr().err
    assert code in (2, 3, 4), said
    assert said.count("\n") == 1 and len(said) <= 600
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_models_of_sizes_that_nobody_trains_are_one_line(
    command: str, built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(built_model, tmp_path / "model")
    config = json.loads((model / "unet/config.json").read_text())
    (model / "unet/config.json").write_text(json.dumps(config | {"sample_size": 1}))  # 4 px
    place = str(pictures(tmp_path / "pictures", 2))
    rest = {"evaluate": [str(model), "--data", place], "finetune": [place, "--model", str(model), "--out", "run"]}
    assert main([command, *rest[command]]) == 2
    assert "the pictures cannot be read at 4 px: size: " in capsys.readouterr().err


def test_a_recorded_model_of_a_long_name_is_one_line(
    built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fox.png"
    assert main(["generate", "fox", "--model", str(built_model), "--steps", "1", "-o", str(out)]) == 0
    write_png(out, open_image(out), {METADATA_KEY: json.dumps(read_record(out) | {"model": "a" * 5000})})
    capsys.readouterr()
    assert main(["replay", str(out)]) in (2, 3)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) <= 600


def test_logs_that_are_a_file_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(StorageError, match="cannot write logs to"):
        TensorBoard(tmp_path, 0)


def test_dtypes_and_attentions_that_are_lists_are_refused() -> None:
    with pytest.raises(InputError, match=r"dtype .* is unknown"):
        resolve_dtype(["float32"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"attention .* is unknown"):
        find_attention(["sdpa"], torch.device("cpu"))  # type: ignore[arg-type]


def test_places_and_dtypes_of_python_that_cannot_be_are_refused(built_model: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(built_model, device="cpu")
    result = pipe("a fox", num_inference_steps=1)
    odd: list[Any] = [None, 7, b"a.png", "\ud800.png", "a\0b.png"]
    for place in odd:
        for write in (result.save, lambda one: result.write(0, one), pipe.save_pretrained):
            with pytest.raises(InputError, match="must be given by "):
                write(place)
    wrong: list[Any] = ["x", 7, torch.int8]
    for dtype in wrong:
        with pytest.raises(InputError, match=r"dtype must be one of torch.float32"):
            pipe.save_pretrained(tmp_path / "model", dtype=dtype)
    assert not list(tmp_path.iterdir())
