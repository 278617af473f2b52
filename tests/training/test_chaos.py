"""A small share of `tests/benchmarks/chaos.py`: kills at random and at every file boundary of a save, damaged files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/chaos.py"


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_killed_runs_end_as_the_unbroken_one_and_damage_is_found() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "4", "--flips", "50", "--stages", "autoencoder"]
    ended = subprocess.run([*command, "--processes", "1"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    # Before and in each of seven files, before each is flushed, before and after the folder takes its name, ...
    boundaries = figures["boundaries"]["autoencoder-1"]
    assert figures["boundary_kills"] >= boundaries > 7 * 3
    assert figures["random_kills"] == 4 and figures["finished_runs"] >= 2 and figures["damages"] == 50
