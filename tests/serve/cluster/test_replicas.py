"""`latentdiff serve --replicas 2` on a cluster of this machine answers as one server, and outlives its replicas."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.http.conftest import ELSEWHERE
from tests.two_processes import free_port, processes_called

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
TESTS = ROOT / "tests/serve/http"
GENERATIONS = "/v1/images/generations"
QUICK: dict[str, Any] = {"prompt": "fox", "steps": 40, "guidance_scale": 1.0}
PATIENCE = 300.0  # seconds; machines are shared


@dataclass
class Cluster:
    """The command that serves, and the address it answers at."""

    process: subprocess.Popen[str]
    url: str

    def http(self) -> httpx.Client:
        """Return a client."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE)


@pytest.fixture(scope="module")
def cluster(built_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas of the model."""
    port, place = free_port(), tmp_path_factory.mktemp("cluster")
    command = [sys.executable, "-m", "latentdiff", "serve", "--replicas", "2", "--model", str(built_model)]
    command += ["--device", "cpu", "--batch", "4", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (
        open(place / "errors", "w+") as errors,
        subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address, Path(errors.name).read_text()
            yield Cluster(process, address.removesuffix("/v1"))
        finally:
            process.kill()


def replicas() -> list[int]:
    """Return the processes of replicas on this machine."""
    return processes_called("latentdiff-replica")


def test_the_tests_of_one_server_pass(cluster: Cluster) -> None:
    """All those that need no server of their own, and do not look into its process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    command += [f"--ignore={TESTS / 'test_deployment.py'}"]
    environment = {**os.environ, ELSEWHERE: cluster.url}
    ended = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:]
    passed = int(ended.stdout.splitlines()[-1].partition(" passed")[0].split()[-1])
    assert passed > 150


def test_both_draw(cluster: Cluster) -> None:
    with cluster.http() as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/jobs", json=QUICK).json()["id"], range(8)))
    assert len({name.partition(".")[0] for name in answers}) == 2


def test_a_client_that_goes_away_ends_its_job(cluster: Cluster) -> None:
    with cluster.http() as client:
        with client.stream("POST", GENERATIONS, json={**QUICK, "steps": 200, "n": 10, "stream": True}) as answer:
            assert next(answer.iter_lines()).startswith(":")
        until = time.monotonic() + PATIENCE
        while "latentdiff_cancelled_total 1.0" not in client.get("/metrics").text:  # of one replica or the other
            assert time.monotonic() < until
            time.sleep(0.5)


def test_a_replica_that_is_killed_loses_no_request(cluster: Cluster) -> None:
    answers, ended = list[int](), threading.Event()

    def draw(client: httpx.Client) -> None:
        while not ended.is_set():
            answers.append(client.post(GENERATIONS, json=QUICK).status_code)

    before = replicas()
    assert len(before) == 2
    with ThreadPoolExecutor(4) as pool, cluster.http() as client:
        drawing = [pool.submit(draw, client) for _ in range(4)]
        until = time.monotonic() + PATIENCE
        while len(answers) < 4 and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(before[0], signal.SIGKILL)
        so_far = len(answers)
        while len(answers) < so_far + 12 and time.monotonic() < until:
            time.sleep(0.1)
        ended.set()
        for one in drawing:
            one.result()
    assert set(answers) == {200} and len(answers) >= so_far + 12
    while len(now := replicas()) < 2 and time.monotonic() < until:  # another takes its place
        time.sleep(0.5)
    assert len(now) == 2 and before[0] not in now


def test_jobs_are_finished_before_it_ends(cluster: Cluster) -> None:
    with cluster.http() as client, ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(lambda: client.post(GENERATIONS, json={**QUICK, "steps": 200, "n": 2}).status_code)
        time.sleep(2.0)
        cluster.process.send_signal(signal.SIGTERM)
        assert drawing.result() == 200
    assert cluster.process.wait(PATIENCE) == 0
    assert not replicas()
