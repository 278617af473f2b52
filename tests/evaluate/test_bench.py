"""The table of engines: what is measured, in turns, what is refused, and that differences are those of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff.cli import main
from latentdiff.engine import execution
from latentdiff.evaluate import bench
from latentdiff.evaluate.bench import Row, candidates, measure


def test_differences_are_those_of_pictures() -> None:
    exact = np.zeros((2, 4, 4, 3))
    row = Row("eager", "bfloat16")
    bench._compare(row, exact.copy(), exact)
    assert (row.psnr, row.worst, row.largest) == (None, None, 0.0)
    pictures = np.stack([exact[0] + 0.1, exact[1] + 0.01])
    bench._compare(row, pictures, exact)
    assert row.psnr == pytest.approx(30) and row.worst == pytest.approx(20) and row.largest == pytest.approx(0.1)


def test_the_first_is_eager_in_float32_and_others_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    found = list(candidates("cpu", ["eager", "none"], ["bfloat16"], refused))
    assert [(one.engine.name, one.dtype) for one in found] == [("eager", torch.float32), ("eager", torch.bfloat16)]
    assert len(refused) == 1 and refused[0].startswith("none in bfloat16: engine 'none' is unknown")
    monkeypatch.setattr(bench, "installed", lambda: False)
    monkeypatch.setattr("latentdiff.devices.supports_bfloat16", lambda device: False)
    assert [one.dtype for one in candidates("cpu", [], [], refused)] == [torch.float32]


def test_a_model_is_measured_in_turns(built_model: Path) -> None:
    said: list[str] = []
    found = measure(
        str(built_model), "cpu", engines=["eager"], dtypes=["bfloat16"], rounds=2, steps=2, shell=False, say=said.append
    )
    exact, half = found.rows
    assert (exact.engine, exact.dtype, exact.largest, exact.memory) == ("eager", "float32", 0.0, None)
    assert (half.dtype, half.psnr is not None, half.largest > 0) == ("bfloat16", True, True)
    assert min(exact.step, half.step, exact.picture, half.picture) > 0
    assert said[-2:] == ["round 1 of 2", "round 2 of 2"]


def test_the_command_prints_a_table_and_one_object(built_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["bench", "--model", str(built_model), "--device", "cpu", "--engines", "eager", "--dtypes", "float32"]
    assert main([*call, "--rounds", "1", "--steps", "1"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    (row,) = json.loads(last)["rows"]
    assert row["engine"] == "eager" and row["shell"] > 0 and row["memory"] > 2**20
    assert table[-1].startswith("eager     float32") and table[-1].endswith("equal")
    assert main(["bench", "--rounds", "0"]) == 2
    assert execution.ENGINES.keys() == set(bench.ENGINES)
