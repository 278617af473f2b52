"""The Ray engine: its parts alone, what it refuses, and a cluster of this machine that draws as processes do."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from latentdiff import ray_driver
from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.scale import cluster
from latentdiff.scale.cluster import require_ray
from tests.scale.small import contents, ray_workers, write_table

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def test_a_missing_or_old_ray_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs ray, got none; install it with `pip install 'latentdiff\[ray\]'`"
    ):
        require_ray()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__="2.9.3", data=None))
    monkeypatch.setitem(sys.modules, "ray.data", ModuleType("ray.data"))
    with pytest.raises(MissingDependencyError, match=r"--engine ray needs ray 2.40 or newer, got 2.9.3; .*install -U"):
        require_ray()


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(InputError, match=f"no Ray cluster answers at 'ray://127.0.0.1:{port}'"):
        ray_driver._require_answer(f"ray://127.0.0.1:{port}")
    ray_driver._require_answer("auto")


def test_a_cluster_that_asks_for_a_token_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = type("AuthenticationError", (Exception,), {})("InvalidAuthToken")

    def init(**options: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster") from refused

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    message = "'auto' asks for a token, got none or another; set RAY_AUTH_MODE=token"
    with pytest.raises(InputError, match=message), ray_driver.joined("auto"):
        pass


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
    parents = dict[int, int]()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue

    def below(process: int) -> bool:
        while process > 1:
            process = parents.get(process, 0)
            if process == driver:
                return True
        return False

    return [process for process in ray_workers() if below(process)]


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
