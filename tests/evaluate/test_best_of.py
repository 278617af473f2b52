"""The best of several pictures, by an image-text model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentdiff.cli import main
from latentdiff.errors import ModelMismatchError
from latentdiff.evaluate.judge import load_judge
from latentdiff.generation.result import read_record
from latentdiff.images import open_image, to_tensor


def test_the_best_of_each_four_is_kept_and_can_be_replayed(
    judge: Path, built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["generate", "a fox", "a cat", "--model", str(built_model), "--steps", "2", "--json"]
    assert main([*call, "-n", "4", "-o", "all.png"]) == 0
    every = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*call, "--best-of", "4", "--judge", str(judge), "-o", "best.png"]) == 0
    kept = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = load_judge(judge)
    pictures = found.images(to_tensor([open_image(file) for file in every["files"]]))
    fits = (pictures * found.texts(every["prompts"])).sum(dim=1)
    expected = [first + int(fits[first : first + 4].argmax()) for first in (0, 4)]
    assert kept["prompts"] == ["a fox", "a cat"] and kept["seeds"] == expected
    for file, number in zip(kept["files"], expected):
        assert open_image(file).tobytes() == open_image(every["files"][number]).tobytes()
        assert read_record(file)["seed"] == number
    assert main(["replay", kept["files"][1], "--model", str(built_model), "-o", "again.png"]) == 0


def test_what_cannot_judge_is_refused(
    judge: Path, built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "a fox", "--model", str(built_model), "--steps", "2", "-o", str(tmp_path / "a.png")]
    for more, message in (
        (["--best-of", "0"], "--best-of must be a whole number from 1 to 100, got 0"),
        (["--judge", str(judge)], "got no --best-of; add it"),
        (["--best-of", "2", "--judge", str(tmp_path)], "config.json"),
    ):
        assert main([*call, *more]) in (2, 3)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(ModelMismatchError, match="trained beside the text encoder"):
        load_judge(judge, text_encoder=built_model)
