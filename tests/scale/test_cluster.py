"""The Ray engine: its parts alone, what it refuses, and a cluster of this machine that draws as processes do."""

from __future__ import annotations

import builtins
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.scale import cluster
from latentdiff.scale.cluster import require_ray
from tests.scale.small import contents, write_table

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def test_a_missing_ray_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ray(name: str, *given: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("no ray", name="ray")
        return real(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(
        MissingDependencyError, match=r"needs ray, got none; install it with `pip install 'latentdiff\[ray\]'`"
    ):
        require_ray()


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(InputError, match=f"no Ray cluster answers at 'ray://127.0.0.1:{port}'"):
        cluster._require_answer(f"ray://127.0.0.1:{port}")
    cluster._require_answer("auto")


@needs_ray
@pytest.mark.long
def test_a_cluster_gives_the_pictures_of_processes(tmp_path: Path, built_model: Path) -> None:
    """To the byte, and when one of its workers is killed; in processes of their own, as Ray keeps threads."""
    rows = [{"prompt": f"{number}", "seed": number} for number in range(12)] + [{"prompt": "bad", "steps": "x"}]
    write_table(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, "-m", "latentdiff", "batch", "rows.jsonl"]
    options = ["--model", str(built_model), "--device", "cpu", "--steps", "100", "--shard-size", "2", "--workers"]
    root = str(Path(cluster.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    how: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True, "stderr": subprocess.PIPE}
    assert subprocess.run([*command, "local", *options, "0"], check=False, **how).returncode == 0
    driver = subprocess.Popen([*command, "ray", *options, "2", "--engine", "ray"], **how)
    until = time.monotonic() + 200
    while not (tmp_path / "ray/manifests").is_dir() and time.monotonic() < until and driver.poll() is None:
        time.sleep(0.05)
    killed = _workers_below(driver.pid)[:1]
    for worker in killed:
        os.kill(worker, signal.SIGKILL)
    _, error = driver.communicate(timeout=300)
    assert driver.returncode == 0 and killed, error
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def _workers_below(driver: int) -> list[int]:
    """Return the processes of Ray that draw, of those that a driver started."""
    found, parents = list[int](), dict[int, int]()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = place.read_text().rpartition(")")[::2]
            parents[int(place.parent.name)] = int(rest.split()[1])
            if "ray::MapWorker" in (place.parent / "cmdline").read_text() or "ray::Map" in name:
                found.append(int(place.parent.name))
        except (OSError, ValueError):
            continue

    def below(process: int) -> bool:
        while process > 1:
            process = parents.get(process, 0)
            if process == driver:
                return True
        return False

    return [process for process in found if below(process)]


@needs_ray
@pytest.mark.long
def test_a_cluster_draws_past_a_worker_that_hangs_and_publishes_how_far_it_is(tmp_path: Path) -> None:
    root = str(Path(cluster.__file__).parents[2])
    command = [sys.executable, "-m", "tests.scale.hanging", str(tmp_path)]
    how: dict[str, Any] = {"cwd": root, "env": {**os.environ, "PYTHONPATH": root}, "text": True, "capture_output": True}
    ended = subprocess.run(command, check=False, timeout=300, **how)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "mark").exists()
    assert ended.stdout.splitlines()[-1].endswith(" 24.0")
