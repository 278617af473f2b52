"""Replicas of the server on Ray Serve under load: what a second one gains, how it comes by itself, and an update.

    pip install -e '.[serve,ray]'
    python tests/benchmarks/serve_replicas.py
    python tests/benchmarks/serve_replicas.py --clients 16 --seconds 60 --cores 4

The embedded model is served on a cluster of this machine, while clients ask for pictures in a closed loop, from the
first phase to the last: by one replica with all cores, by one with half of them, by as many as the load asks for (which
must become two), and by two after an update that changes their options. Prints pictures a second of each phase, how
long the second replica took to come and the update to end, and how many requests failed, which must be none; a JSON
line at the end. The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx
import ray
from ray import serve

from latentdiff.serve.cluster.application import build
from tests.two_processes import free_port, processes_called

ROUTE = "/v1/images/generations"
REPLICA = "latentdiff-replica"
AT_MOST = 300.0  # seconds until something must have happened


class Load:
    """Clients that ask for a picture as soon as they have the last one."""

    def __init__(self, url: str, clients: int, steps: int) -> None:
        self.url, self.steps = url, steps
        self.answered, self.failed = list[float](), list[str]()
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=AT_MOST) as client:
            while not self.ended.is_set():
                body = {"prompt": "a red fox", "seed": number, "steps": self.steps}
                try:
                    answer = client.post(ROUTE, json=body)
                    if answer.status_code != 200:
                        self.failed.append(answer.text[:200])
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))
                self.answered.append(time.monotonic())

    def rate(self, seconds: float) -> float:
        """Return how many pictures a second were answered in the next so many seconds."""
        begun = time.monotonic()
        time.sleep(seconds)
        return sum(begun <= moment <= begun + seconds for moment in self.answered) / seconds

    def end(self) -> None:
        """Let each client have its last picture."""
        self.ended.set()
        for thread in self.threads:
            thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=40, help="of each phase, from when it is settled")
    parser.add_argument("--cores", type=int, default=2, help="which all replicas together may use")
    options = parser.parse_args()
    port, half = free_port(), max(1, options.cores // 2)
    ray.init(num_cpus=options.cores + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
    print(f"load {os.getloadavg()[0]:.1f} before, {options.clients} clients", flush=True)
    told: dict[str, Any] = {}
    deploy(replicas=1, threads=options.cores)
    load = Load(f"http://127.0.0.1:{port}", options.clients, options.steps)
    told["one replica, all cores"] = settled(load, options.seconds)
    deploy(replicas=1, threads=half)
    told["one replica, half of them"] = settled(load, options.seconds)
    begun = time.monotonic()
    deploy(replicas=1, max_replicas=2, target=options.clients / 4, threads=half)
    told["seconds to the second replica"] = wait_for(lambda: len(processes_called(REPLICA)) == 2, begun)
    told["two replicas, half each"] = settled(load, options.seconds)
    before, begun = set(processes_called(REPLICA)), time.monotonic()
    deploy(replicas=2, threads=half, batch=4)
    told["seconds to an update"] = wait_for(lambda: not before & set(processes_called(REPLICA)), begun)
    told["two replicas after it"] = settled(load, options.seconds)
    load.end()
    serve.shutdown()
    ray.shutdown()
    told["answered"], told["failed"] = len(load.answered), len(load.failed)
    for name, figure in told.items():
        print(f"{name}: {figure:.3g}" if isinstance(figure, float) else f"{name}: {figure}")
    for message in load.failed[:5]:
        print(message)
    print(json.dumps(told))
    return int(bool(load.failed))


def deploy(**given: Any) -> None:
    """Serve with some options, in place of those of before, and wait until it is so."""
    serve.run(build({"models": ["embedded"], "device": "cpu", "cores": 0.5, **given}), name="latentdiff")


def settled(load: Load, seconds: float) -> float:
    """Return the rate of a phase, once it has been under way for ten seconds."""
    time.sleep(10)
    return load.rate(seconds)


def wait_for(happened: Any, begun: float) -> float:
    """Wait until something is the case and return the seconds since the beginning."""
    while not happened():
        if time.monotonic() - begun > AT_MOST:
            raise TimeoutError(f"it did not happen in {AT_MOST:.0f} s")
        time.sleep(0.5)
    return time.monotonic() - begun


if __name__ == "__main__":
    sys.exit(main())
