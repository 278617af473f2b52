"""Several processes that share the drawing write the report of one, and end together."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from latentdiff.cli import main
from latentdiff.evaluate import judge as judging
from latentdiff.evaluate import processes
from tests.evaluate.small import make_overflow
from tests.two_processes import free_port, run_two

METRICS = "kid,clip,retrieval"
NO_MEMORY = 4  # exit code


def evaluate_as(rank: int, ports: list[int], calls: list[list[str]], text: Path, threads: int, codes: Path) -> None:
    """Be one of two processes that run some commands, the last of them until the main one's memory ends."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(threads)
    judging.embedded_model = lambda: text  # type: ignore[attr-defined]
    found: list[int | str] = []
    for port, call in zip(ports, calls):
        os.environ["MASTER_PORT"] = str(port)
        if call is calls[-1] and rank == 0:
            processes.generate = no_memory  # type: ignore[attr-defined]
        try:
            found.append(main(call))
        except RuntimeError as error:
            found.append("Connection" if "onnection" in str(error) else str(error))
    (codes / f"{rank}.json").write_text(json.dumps(found))


def no_memory(*_: object) -> None:
    raise MemoryError


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:invalid value")  # of what is not finite
def test_two_processes_write_the_report_of_one(call: list[str], built_model: Path, text: Path, tmp_path: Path) -> None:
    """Also over two dtypes; and what the model cannot do, or what nobody expected, leaves none of them waiting."""
    broken = shutil.copytree(built_model, tmp_path / "broken")
    make_overflow(broken / "unet")
    calls = {
        "whole": [*call, "--metrics", METRICS, "--n", "7"],
        "sweep": [*call, "--n", "3", "--sweep", "dtype=float32,bfloat16"],
        "nan": [call[0], str(broken), *call[2:]],
        "ended": call,
    }
    for name in ("whole", "sweep"):
        assert main([*calls[name], "--out", str(tmp_path / "one" / name)]) == 0
    two = [[*one, "--out", str(tmp_path / "two" / name)] for name, one in calls.items()]
    ports = [free_port() for _ in two]
    run_two(evaluate_as, ports, two, text, torch.get_num_threads(), tmp_path)
    codes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert codes == [[0, 0, 2, NO_MEMORY], [0, 0, 0, "Connection"]]
    ours, theirs = (
        {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (tmp_path / "one", tmp_path / "two")
    )
    assert theirs.pop(Path("ended/request.json")) and not any(path.parts[0] == "nan" for path in theirs)
    theirs = {path: data for path, data in theirs.items() if path.parts[0] != "ended"}
    assert ours.keys() == theirs.keys() and len([path for path in ours if path.name == "report.json"]) == 3
    assert all(theirs[path] == data for path, data in ours.items())
