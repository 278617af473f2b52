"""`latentdiff batch`: what it prints, what it refuses, and how it ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from latentdiff.cli import main
from latentdiff.generation.result import read_record
from latentdiff.images import open_image
from latentdiff.pipeline import Pipeline
from latentdiff.scale.drawn import drawn_files
from tests.scale.small import contents, use_pipe, write_table


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_table(tmp_path / "rows.jsonl", [{"prompt": f"{n}", "seed": n, "id": f"i{n}"} for n in range(3)])


def test_a_table_is_drawn_and_then_there_is_nothing_to_do(
    table: str,
    tmp_path: Path,
    built_model: Path,
    pipe: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_pipe(monkeypatch, pipe)
    command = ["batch", "rows.jsonl", "out", "--model", str(built_model), "--steps", "2", "--workers", "0"]
    assert main([*command, "--size", "32x40"]) == 0
    assert capsys.readouterr().out == "3 rows in 1 shards: 3 drawn\n"
    assert main([*command, "--size", "32x40"]) == 0
    assert capsys.readouterr().out == "nothing to do: all 3 rows are in out\n"
    (file,) = (tmp_path / "out/shards").iterdir()
    with tarfile.open(file) as archive:
        told = json.load(archive.extractfile(archive.getmembers()[0]))  # type: ignore[arg-type]
    assert (told["id"], told["row"], told["seed"], told["settings"]["height"]) == ("i0", 1, 0, 40)
    assert main(command) == 2
    assert "is of another job: height was 40, is not given" in capsys.readouterr().err
    write_table(tmp_path / "rows.jsonl", [{"prompt": "0", "seed": 0, "id": "i0"}, {"prompt": "9", "steps": "?"}])
    assert main([*command, "--size", "32x40", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {name: report[name] for name in ("rows", "drawn", "taken", "failed", "retired")} == {
        "rows": 2,
        "drawn": 0,
        "taken": 1,
        "failed": 1,
        "retired": 1,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "-1"], "--workers must be"),
        (["--format", "zip"], "zip"),
        (["--guidance", "99"], "guidance_scale must be"),
        (["--lora", "none.safetensors"], "there is no such file"),
        (["--embedding", "none.safetensors"], "there is no such file"),
        (["--model", "none"], "none"),
        (["--shard-size", "0"], "--shard-size must be"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    table: str, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["batch", "rows.jsonl", "out", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_another_engine_draws_other_pictures_of_other_names(
    table: str, tmp_path: Path, built_model: Path, capsys: pytest.CaptureFixture[str], converted: Path
) -> None:
    command = ["batch", "rows.jsonl", "--model", str(built_model), "--device", "cpu", "--steps", "2", "--workers", "0"]
    command += ["--format", "files"]
    openvino = [*command, "fast", "--model-engine", "openvino"]
    assert main([*command, "plain"]) == main(openvino) == 0
    assert capsys.readouterr().out == "3 rows in 1 shards: 3 drawn\n" * 2
    names = [{file.stem for file in (tmp_path / out).rglob("*.png")} for out in ("plain", "fast")]
    assert [len(one) for one in names] == [3, 3] and not names[0] & names[1]
    files = [drawn_files(tmp_path / out) for out in ("plain", "fast")]
    for plain, fast in zip(*(one or [] for one in files), strict=True):
        assert (read_record(plain)["engine"], read_record(fast)["engine"]) == ("eager", "openvino")
        difference = np.asarray(open_image(plain), int) - np.asarray(open_image(fast), int)
        assert np.abs(difference).max() <= 1
    assert main([*command, "fast"]) == 2
    assert "engine was 'openvino', is 'eager'; choose another OUT" in capsys.readouterr().err
    assert main(openvino) == 0
    assert capsys.readouterr().out == "nothing to do: all 3 rows are in fast\n"


def test_an_engine_that_does_not_run_here_leaves_nothing_behind(
    table: str, tmp_path: Path, built_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["batch", table, "out", "--model", str(built_model), "--device", "cpu", "--model-engine", "graphs"]) == 2
    )
    assert "engine 'graphs' is for NVIDIA GPUs, got cpu; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_column_is_one_line(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path / "rows.jsonl", [{"prompt": "a", "stepps": 2}])
    assert main(["batch", "rows.jsonl", "out"]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err
    assert main(["batch", "none.jsonl", "out"]) == 2


@pytest.mark.long
def test_signals_to_the_driver_and_its_workers(table: str, tmp_path: Path, built_model: Path) -> None:
    """SIGTERM ends it with a line; kill -9 of the driver takes the workers along; the rest is drawn once."""
    rows = [{"prompt": f"{number}", "seed": number, "steps": 20} for number in range(40)]
    write_table(tmp_path / "rows.jsonl", rows)
    whole = ["batch", "rows.jsonl", "whole", "--model", str(built_model), "--shard-size", "4", "--device", "cpu"]
    command = [sys.executable, "-m", "latentdiff", *whole[:2], "out", *whole[3:], "--workers", "2"]
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        done = len(list((tmp_path / "out").glob("manifests/*")))
        driver = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        with driver:
            until = time.monotonic() + 120
            while len(list((tmp_path / "out").glob("manifests/*"))) <= done and time.monotonic() < until:
                time.sleep(0.02)
            driver.send_signal(number)
            assert driver.wait() == code
            assert driver.stderr is not None
            if number == signal.SIGTERM:
                assert "rows are done; the same command goes on" in driver.stderr.read()
    assert len(list((tmp_path / "out").glob("manifests/*"))) < 10
    assert subprocess.run(command, check=False).returncode == 0
    assert main([*whole, "--workers", "0"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
