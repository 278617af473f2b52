"""Kill `latentdiff batch` at random and at every file boundary of a commit, and see that all is drawn exactly once.

    python tests/benchmarks/batch_chaos.py
    python tests/benchmarks/batch_chaos.py --rows 400 --kills 60 --steps 1 --format files
    python tests/benchmarks/batch_chaos.py --nodes 2          # on a Ray cluster of so many, all on this machine

A table is drawn by the embedded model, or that of --model, once undisturbed, in one process, and once by a driver
with workers that are killed (SIGKILL), it or one of them, at random moments, and started again until it ends. Then a
small one is drawn by a process that is killed before each of its operations on files. Each time the outputs must be
the same to the byte, every row in the manifests once, and no shard that was there gone. Drivers and workers are forks
of this process, which takes no time to start; with --nodes they are processes of their own, and whole nodes are
killed too. Prints the figures and a JSON line; the exit code is 1 if one of them is not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from latentdiff.scale import local
from latentdiff.scale.batch import How, run_batch
from latentdiff.scale.formats import FORMATS
from latentdiff.scale.job import Job
from latentdiff.scale.manifest import read_manifest, shards_in
from latentdiff.scale.model import Model
from latentdiff.scale.store import LocalStore
from tests.scale.small import contents, die_at, in_a_fork, ray_workers, write_table

BAD_EVERY = 97  # rows, of which one cannot be drawn


@dataclass
class Figures:
    """What is counted."""

    rows: int = 0
    worker_kills: int = 0
    driver_kills: int = 0
    node_kills: int = 0
    boundary_kills: int = 0
    other_files: int = 0
    rows_not_once: int = 0
    shards_lost: int = 0
    errors: int = 0

    def failed(self) -> bool:
        """Say whether a promise was broken."""
        return self.other_files + self.rows_not_once + self.shards_lost + self.errors > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=200, help="at random moments")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=0, help="of a Ray cluster; 0 for processes without Ray")
    parser.add_argument("--pause", type=float, help="seconds from kill to kill; else they are spread over the work")
    parser.add_argument("--shard-size", type=int, default=16)
    parser.add_argument("--format", choices=list(FORMATS), default="webdataset")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = Model(options.model, device="cpu")
    pipe, facts = named.load(), named.facts()
    Model.load = lambda model: pipe  # type: ignore[method-assign]  # which forks share
    Model.facts = lambda model: facts  # type: ignore[method-assign]
    real = local.multiprocessing.get_context
    local.multiprocessing.get_context = lambda kind: real("fork")  # type: ignore[assignment, misc, arg-type]
    figures, begun = Figures(rows=options.rows), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (kill_on_cluster if options.nodes else kill_at_random)(Path(folder), options, figures)
        kill_at_boundaries(Path(folder), options, figures)
    seconds = time.monotonic() - begun
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(
        f"{figures.rows:,} rows: {figures.worker_kills} workers, {figures.driver_kills} drivers and "
        f"{figures.node_kills} nodes killed at random, ",
        end="",
    )
    print(f"{figures.boundary_kills} processes at boundaries, in {seconds:.0f} s ({load})")
    print(f"other files {figures.other_files}, rows that are not there once {figures.rows_not_once}, ", end="")
    print(f"shards lost {figures.shards_lost}, errors {figures.errors}")
    print(json.dumps({**asdict(figures), "format": options.format, "seconds": round(seconds, 1)}))
    return int(figures.failed())


def undisturbed(place: Path, options: argparse.Namespace, figures: Figures) -> tuple[str, Path, float]:
    """Draw a table in one process; return it, the output, and how long to wait from one kill to the next."""
    rows = [
        {"prompt": f"a red fox, number {number}", "seed": number, "steps": "?" if number % BAD_EVERY == 50 else None}
        for number in range(options.rows)
    ]
    table, whole, started = write_table(place / "rows.jsonl", rows), place / "whole", time.monotonic()
    figures.errors += in_a_fork(lambda: draw(table, whole, options, 0)) != 0
    seconds = time.monotonic() - started
    print(f"undisturbed, in one process: {seconds:.0f} s", flush=True)
    spread = seconds / max(1, options.nodes or options.workers) / max(1, options.kills)
    return table, whole, spread if options.pause is None else options.pause


def kill_at_random(place: Path, options: argparse.Namespace, figures: Figures) -> None:
    """Draw a table undisturbed, and again while its driver and workers are killed."""
    dice, broken = random.Random(options.seed), place / "broken"
    table, whole, pause = undisturbed(place, options, figures)
    driver, there = start(table, broken, options), 0
    while figures.worker_kills + figures.driver_kills < options.kills:
        time.sleep(dice.uniform(0, 2 * pause))
        ended, status = os.waitpid(driver, os.WNOHANG)
        if ended:
            figures.errors += status != 0
            break
        workers = children_of(driver)
        if workers and dice.random() < 0.6:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(workers), signal.SIGKILL)
                figures.worker_kills += 1
            continue
        os.kill(driver, signal.SIGKILL)
        os.waitpid(driver, 0)
        figures.driver_kills += 1
        now = len(shards_in(LocalStore(broken)))
        figures.shards_lost += now < there
        there = now
        driver = start(table, broken, options)
    else:
        figures.errors += os.waitpid(driver, 0)[1] != 0
    compare(whole, broken, options.rows, figures)


def kill_on_cluster(place: Path, options: argparse.Namespace, figures: Figures) -> None:
    """Draw a table undisturbed, and again on a Ray cluster whose nodes and workers are killed, as is the driver."""
    from ray.cluster_utils import Cluster

    dice, broken = random.Random(options.seed), place / "broken"
    table, whole, pause = undisturbed(place, options, figures)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(options.nodes)]
    command = on_cluster(table, broken, cluster.address, options)

    def start_again() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    driver, there = start_again(), 0
    while figures.worker_kills + figures.driver_kills + figures.node_kills < options.kills and driver.poll() is None:
        time.sleep(dice.uniform(0, 2 * pause))
        workers, chance = ray_workers(), dice.random()
        if workers and chance < 0.6:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(workers), signal.SIGKILL)
                figures.worker_kills += 1
        elif workers and chance < 0.8:
            cluster.remove_node(nodes.pop(dice.randrange(len(nodes))), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))
            figures.node_kills += 1
        elif chance >= 0.8 and shards_in(LocalStore(broken)):
            driver.kill()
            driver.communicate()
            figures.driver_kills += 1
            now = len(shards_in(LocalStore(broken)))
            figures.shards_lost += now < there
            there = now
            driver = start_again()
    _, said = driver.communicate()
    if driver.returncode != 0:
        figures.errors += 1
        print(said)
    cluster.shutdown()
    compare(whole, broken, options.rows, figures)


def on_cluster(table: str, out: Path, address: str, options: argparse.Namespace) -> list[str]:
    """Return the command that draws a table on a Ray cluster."""
    command = [*(sys.executable, "-m", "latentdiff", "batch", table, str(out)), "--engine", "ray", "--device", "cpu"]
    command += ["--address", address, "--workers", str(options.nodes), "--steps", str(options.steps)]
    command += ["--guidance", "1", "--threads", "1", "--max-failures", str(options.rows)]
    return [*command, "--shard-size", str(options.shard_size), "--format", options.format]


def kill_at_boundaries(place: Path, options: argparse.Namespace, figures: Figures) -> None:
    """Draw a small table in one process that is killed before its first operation on files, its second, ..."""
    table = write_table(place / "few.jsonl", [{"prompt": "a red fox", "seed": n} for n in range(3)])
    whole = place / "few"
    small = argparse.Namespace(**{**vars(options), "shard_size": 2})
    figures.errors += in_a_fork(lambda: draw(table, whole, small, 0)) != 0
    boundary, ended = 0, -1
    while ended:
        boundary, out = boundary + 1, place / f"few-{boundary}"

        def broken(out: Path = out, boundary: int = boundary) -> None:
            die_at(boundary)
            draw(table, out, small, 0)

        ended = in_a_fork(broken)
        figures.boundary_kills += ended == -signal.SIGKILL
        figures.errors += ended not in (0, -signal.SIGKILL)
        figures.errors += in_a_fork(lambda out=out: draw(table, out, small, 0)) != 0  # type: ignore[misc]
        compare(whole, out, 3, figures)
        shutil.rmtree(out)


def start(table: str, out: Path, options: argparse.Namespace) -> int:
    """Start a driver and return its process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            draw(table, out, options, options.workers)
            code = 0
        finally:
            os._exit(code)
    return pid


def draw(table: str, out: Path, options: argparse.Namespace, workers: int) -> None:
    """Draw a table."""
    settings = {"num_inference_steps": options.steps, "guidance_scale": 1.0}
    job = Job(Model(options.model, device="cpu"), settings, (), options.format, options.shard_size)
    with contextlib.redirect_stderr(io.StringIO()):
        run_batch(table, str(out), job, How(workers=workers, max_failures=options.rows, say=lambda line: None))


def compare(whole: Path, broken: Path, rows: int, figures: Figures) -> None:
    """Count the files that differ, and the rows that are not there once."""
    ours, theirs = contents(whole), contents(broken)
    figures.other_files += sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())
    store, found = LocalStore(broken), list[Any]()
    for shard in sorted(shards_in(store)):
        manifest = read_manifest(store, shard)
        found += [] if manifest is None else [entry["row"] for entry in manifest.entries]
    if found != [*range(1, rows + 1)]:
        figures.rows_not_once += max(1, sum(found.count(row) != 1 for row in range(1, rows + 1)))


def children_of(process: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main())
