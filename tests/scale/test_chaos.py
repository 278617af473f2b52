"""A small share of `tests/benchmarks/batch_chaos.py`: drivers and workers killed at random."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/batch_chaos.py"


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="drivers are forked")
def test_a_job_that_is_killed_again_and_again_ends_as_one_that_is_not(built_model: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model", str(built_model), "--rows", "24", "--shard-size", "4"]
    command += ["--kills", "4", "--steps", "8", "--format", "parquet"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert figures["boundary_kills"] > 15 and figures["worker_kills"] + figures["driver_kills"] > 0
