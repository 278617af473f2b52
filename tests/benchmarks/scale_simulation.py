"""Simulate `latentdiff batch --engine ray` over 10^8 rows: nodes are lost, workers hang, drivers die.

    python tests/benchmarks/scale_simulation.py
    python tests/benchmarks/scale_simulation.py --node-hours 12 --driver-hours 6 --slow 0.05 --hang 1e-4

Time is simulated; what decides is the code that real jobs run: `plan.compare` says what is missing, each time a driver
begins, and `source.Source` which shard a worker gets, who gets it again and when it is late. Workers take blocks of
places as Ray Data gives them out, and a block whose worker is lost is given out again. Prints a line for each number of
GPUs, and a JSON line. It ends when every shard is written.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import random
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.scale.cluster import MOST_BLOCKS, places_of
from latentdiff.scale.commit import Report
from latentdiff.scale.manifest import MANIFESTS, shards_in
from latentdiff.scale.plan import Head, Shard, Task, compare
from latentdiff.scale.source import WAIT, Source

GPUS_A_NODE = 8
LOADING = 60.0  # seconds of a worker before its first shard
POLL = 20.0  # seconds between two questions of a worker that waits
HOUR = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--seconds", type=float, default=0.491, help="of a GPU at a picture")
    parser.add_argument(
        "--spread", type=float, default=0.1, help="of the seconds of shards, as a deviation of their log"
    )
    parser.add_argument("--node-hours", type=float, default=168.0, help="until a node of 8 GPUs is lost, on average")
    parser.add_argument("--away", type=float, default=600.0, help="seconds until another node is there")
    parser.add_argument("--driver-hours", type=float, default=48.0, help="until the driver dies, on average")
    parser.add_argument("--restart", type=float, default=900.0, help="seconds until it plans again and draws")
    parser.add_argument("--slow", type=float, default=0.01, help="share of shards that take thrice as long")
    parser.add_argument("--hang", type=float, default=1e-5, help="share of shards that a worker hangs at for ever")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(
        "| GPUs | hours | at best | nodes, drivers lost | workers hung | shards begun again; by two at once "
        "| GPU time lost; spent twice | idle; hung |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = [simulated(options, gpus) for gpus in options.gpus]
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nin {time.process_time():.0f} s of CPU time and {megabytes:.0f} MB")
    print(json.dumps({"rows": options.rows, "megabytes": megabytes, "cpu_seconds": time.process_time(), "runs": found}))


def simulated(options: argparse.Namespace, gpus: int) -> dict[str, float]:
    """Simulate a job, print its line, and return its figures."""
    job = Job(options, gpus)
    job.run()
    count, ideal = job.count, options.rows * options.seconds / gpus / HOUR
    assert len(job.store.written) == count, "a shard is missing"
    total = job.now * gpus
    shares = {name: job.seconds[name] / total for name in ("useful", "lost", "doubled", "hung")}
    figures = {
        "gpus": gpus,
        "hours": job.now / HOUR,
        "ideal_hours": ideal,
        **{name: job.events[name] for name in ("nodes", "drivers", "hung", "again", "doubled")},
        **{f"{name}_share": value for name, value in shares.items()},
        "planning_cpu_seconds": job.planning,
    }
    cells = (
        f"{gpus}",
        f"{job.now / HOUR:,.1f}",
        f"{ideal:,.1f}",
        f"{job.events['nodes']:,}, {job.events['drivers']:,}",
        f"{job.events['hung']:,}",
        f"{job.events['again']:,}; {job.events['doubled']:,}",
        f"{shares['lost']:.2%}; {shares['doubled']:.2%}",
        f"{1 - sum(shares.values()):.1%}; {shares['hung']:.1%}",
    )
    print(f"| {' | '.join(cells)} |", flush=True)
    return figures


class Names:
    """The part of a store that planning looks at: which shards are written."""

    place = "simulated"

    def __init__(self) -> None:
        self.written = set[str]()

    def list(self, folder: str) -> set[str]:
        """Return the names of the files in a folder."""
        suffix = {MANIFESTS: ".jsonl", "shards": ".tar"}.get(folder)
        return set() if suffix is None else {f"{name}{suffix}" for name in self.written}


class Worker:
    """A GPU: the block of places that it has, the shard in hand, and what of earlier lives is not to be heard."""

    def __init__(self, number: int) -> None:
        self.number, self.life = number, 0
        self.block, self.at = range(0), 0
        self.task: Task | None = None
        self.began, self.hung, self.away = 0.0, False, False


class Job:
    """A job on a cluster.

    Args:
        options: of the program.
        gpus: of the cluster.
    """

    def __init__(self, options: argparse.Namespace, gpus: int) -> None:
        self.options, self.random = options, random.Random(options.seed)
        self.now, self.planning = 0.0, 0.0
        self.store: Any = Names()
        self.count = -(-options.rows // options.shard_size)
        self.workers = [Worker(number) for number in range(gpus)]
        self.nodes = max(1, gpus // GPUS_A_NODE)
        self.events, self.seconds = Counter[str](), Counter[str]()
        self.queue: list[tuple[float, int, str, int, int]] = []
        self._order, self._driver = 0, 0
        self.source: Source | None = None  # while no driver runs
        self.blocks = deque[range]()

    def heads(self) -> Iterator[Head]:
        """Yield the heads of all shards."""
        size, rows = self.options.shard_size, self.options.rows
        for number in range(self.count):
            digest = hashlib.sha256(number.to_bytes(8, "big")).hexdigest()[:16]
            yield Head(number, f"{number:08d}-{digest}", min(size, rows - number * size))

    def run(self) -> None:
        """Run until all is written."""
        for node in range(self.nodes):
            self.later(self.random.expovariate(1 / (self.options.node_hours * HOUR)), "lose", node)
        self.start_driver()
        while len(self.store.written) < self.count:
            self.now, _, kind, number, life = heapq.heappop(self.queue)
            if kind == "lose":
                self.lose_node(number)
            elif kind == "return":
                self.bring_back(number)
            elif kind == "die" and number == self._driver:
                self.kill_driver()
            elif kind == "start":
                self.start_driver()
            elif kind in ("ask", "done") and self.workers[number].life == life:
                worker = self.workers[number]
                if kind == "done":
                    self.finish(worker)
                self.ask(worker)
        self.count_doubled()
        for worker in self.workers:
            self.account(worker, "doubled")

    def count_doubled(self) -> None:
        """Note how many shards two workers had in hand at once."""
        self.events["doubled"] += 0 if self.source is None else len(self.source.doubled())

    def later(self, seconds: float, kind: str, number: int, life: int = 0) -> None:
        """Have something happen after some seconds."""
        self._order += 1
        heapq.heappush(self.queue, (self.now + seconds, self._order, kind, number, life))

    def start_driver(self) -> None:
        """Plan, and give out what is missing."""
        began = time.process_time()
        plan = compare(self.heads(), "webdataset", self.store)
        self.planning += time.process_time() - began
        missing, size = plan.missing, self.options.shard_size

        def tasks() -> Iterator[Task]:
            for head in self.heads():
                if head.number in missing:
                    rows: Any = range(
                        head.number * size, head.number * size + head.rows
                    )  # of which only the number counts
                    yield Task(Shard(head.number, head.name, rows, ()))

        here = os.getcwd()
        self.source = Source(tasks, here, len(missing), lambda: shards_in(self.store), lambda: self.now)
        places = places_of(len(missing))
        size_of_block = -(-places // min(places, MOST_BLOCKS))
        self.blocks = deque(
            range(first, min(first + size_of_block, places)) for first in range(0, places, size_of_block)
        )
        self._driver += 1
        self.later(self.random.expovariate(1 / (self.options.driver_hours * HOUR)), "die", self._driver)
        for worker in self.workers:
            if not worker.away:
                self.revive(worker)

    def kill_driver(self) -> None:
        """End the driver, and with it all workers."""
        self.events["drivers"] += 1
        for worker in self.workers:
            self.end(worker)
            worker.block = range(0)
        self.count_doubled()
        self.source = None
        self.later(self.options.restart, "start", 0)

    def lose_node(self, node: int) -> None:
        """End a node; what its workers had is given out again."""
        self.events["nodes"] += 1
        for worker in self.on(node):
            worker.away = True
            self.end(worker)
            if worker.block:
                self.blocks.appendleft(worker.block)
                worker.block = range(0)
        self.later(self.options.away, "return", node)

    def bring_back(self, node: int) -> None:
        """Replace a node that was lost."""
        self.later(self.random.expovariate(1 / (self.options.node_hours * HOUR)), "lose", node)
        for worker in self.on(node):
            worker.away = False
            if self.source is not None:
                self.revive(worker)

    def on(self, node: int) -> list[Worker]:
        """Return the workers of a node."""
        return self.workers[node * GPUS_A_NODE : (node + 1) * GPUS_A_NODE]

    def revive(self, worker: Worker) -> None:
        """Begin a worker, which loads the model."""
        worker.life += 1
        worker.hung = False
        self.later(LOADING, "ask", worker.number, worker.life)

    def end(self, worker: Worker) -> None:
        """End a worker and what it has in hand."""
        if worker.task is not None:
            self.events["again"] += worker.task.shard.name not in self.store.written
        self.account(worker, "lost")
        worker.task = None
        worker.life += 1

    def account(self, worker: Worker, kind: str) -> None:
        """Note the time that a worker has been at its shard."""
        if worker.task is not None:
            self.seconds["hung" if worker.hung else kind] += self.now - worker.began

    def ask(self, worker: Worker) -> None:
        """Give a worker something to do, as Ray and the source do."""
        assert self.source is not None
        while True:
            if worker.at >= len(worker.block):
                if not self.blocks:
                    return
                worker.block, worker.at = self.blocks.popleft(), 0
            answer = self.source.get(worker.block[worker.at])
            if answer == WAIT:
                self.later(POLL, "ask", worker.number, worker.life)
                return
            if isinstance(answer, Task):
                break
            worker.at += 1  # which is another's, or all is done
        worker.task, worker.began = answer, self.now
        if self.random.random() < self.options.hang:
            self.events["hung"] += 1
            worker.hung = True
            return
        seconds = answer.lacking * self.options.seconds * self.random.lognormvariate(0, self.options.spread)
        seconds *= 3 if self.random.random() < self.options.slow else 1
        self.later(seconds, "done", worker.number, worker.life)

    def finish(self, worker: Worker) -> None:
        """Write a shard."""
        assert worker.task is not None and self.source is not None
        name, report = worker.task.shard.name, Report(worker.task.shard.number, worker.task.lacking, 0, 0)
        self.account(worker, "doubled" if name in self.store.written else "useful")
        self.store.written.add(name)
        self.source.done(worker.block[worker.at], report)
        worker.task, worker.at = None, worker.at + 1


if __name__ == "__main__":
    main()
