"""Cut nodes of a Ray cluster off from the rest while `latentdiff batch` draws on them, and see that all is drawn once.

    python tests/benchmarks/batch_cut.py                     # as root, on Linux, with iproute2 and Ray
    python tests/benchmarks/batch_cut.py --rows 2000 --cuts 8

Two nodes are in network namespaces of their own, behind a bridge; the head, which draws nothing, and the driver are
outside. A table is drawn once undisturbed, in one process, and once on the cluster, while the link of one node after
another goes down: for three seconds, which Ray bridges, and for a minute, after which it takes the node for lost. A
node that is cut off goes on drawing and writes its shard, which another has been given meanwhile: the disk is the same.
Its processes are ended and a new node is started in its place. In the end the outputs must be the same to the byte and
every row in the manifests once. Prints the figures and a JSON line; the exit code is 1 if one is not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import ray

from latentdiff.scale.manifest import shards_in
from latentdiff.scale.store import LocalStore
from tests.benchmarks.batch_chaos import Figures, compare, on_cluster, undisturbed

BRIDGE, HEAD, PORT = "ldbridge", "10.77.0.1", 6399
SHORT, LONG = 3.0, 60.0  # seconds of a cut
AT_MOST = 300.0  # seconds until something must have happened


@dataclass
class Node:
    """A network namespace, and the node of the cluster in it.

    Attributes:
        number: of it, from 1.
        process: of `ray start`, None before it is started.
    """

    number: int
    process: subprocess.Popen[bytes] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """That of the namespace."""
        return f"ldnode{self.number}"

    def make(self) -> None:
        """Make the namespace, with a link to the bridge."""
        link, address = f"ldlink{self.number}", f"10.77.0.{self.number + 1}"
        ip("netns", "add", self.name)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", link, "master", BRIDGE, "up")
        ip("-n", self.name, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", self.name, "link", "set", "eth0", "up")
        ip("-n", self.name, "link", "set", "lo", "up")

    def start(self) -> None:
        """Start a node in it."""
        command = ["ip", "netns", "exec", self.name, *RAY, "--address", f"{HEAD}:{PORT}", "--num-cpus", "1"]
        command += ["--node-ip-address", f"10.77.0.{self.number + 1}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def link(self, state: str) -> None:
        """Set the link "up" or "down"."""
        ip("link", "set", f"ldlink{self.number}", state)

    def end(self) -> None:
        """End all processes in the namespace."""
        told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in told.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=4, help="short and long ones in turn")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--shard-size", type=int, default=10)
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # of which a machine may have a token from before
    vars(options).update(nodes=2, workers=2, kills=0, pause=None, format="webdataset")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RAY_TMPDIR"] = folder  # where Ray notes which cluster this machine has
        with cluster() as nodes:
            figures, lost = measured(Path(folder), nodes, options)
    seconds, load = time.monotonic() - begun, f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{options.rows:,} rows on two nodes, {options.cuts} cuts, {lost} nodes lost, in {seconds:.0f} s ({load})")
    print(f"other files {figures.other_files}, rows that are not there once {figures.rows_not_once}, ", end="")
    print(f"errors {figures.errors}")
    print(json.dumps({**asdict(figures), "cuts": options.cuts, "nodes_lost": lost, "seconds": round(seconds, 1)}))
    return int(figures.failed() or lost < options.cuts // 2)


def measured(place: Path, nodes: list[Node], options: argparse.Namespace) -> tuple[Figures, int]:
    """Draw a table undisturbed and on the cluster; return what was counted, and how many nodes were lost."""
    figures = Figures(rows=options.rows)
    table, whole, _ = undisturbed(place, options, figures)
    lost = draw_and_cut(table, place / "broken", nodes, options, figures)
    compare(whole, place / "broken", options.rows, figures)
    return figures, lost


@contextlib.contextmanager
def cluster() -> Iterator[list[Node]]:
    """Have a head and two nodes, each in a network namespace."""
    nodes = [Node(1), Node(2)]
    remove(nodes)  # of a run that was killed
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("addr", "add", f"{HEAD}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    command = [*RAY, "--head", "--port", str(PORT), "--node-ip-address", HEAD, "--num-cpus", "0"]
    command += ["--include-dashboard", "false"]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for node in nodes:
            node.make()
        wait_for(answers, "head")
        for node in nodes:
            node.start()
        ray.init(address=f"{HEAD}:{PORT}", log_to_driver=False)
        wait_for(lambda: alive() == 3, "a cluster of three nodes")
        yield nodes
    finally:
        ray.shutdown()
        for node in nodes:
            node.end()
        head.terminate()
        head.wait()
        remove(nodes)


def draw_and_cut(table: str, out: Path, nodes: list[Node], options: argparse.Namespace, figures: Figures) -> int:
    """Draw a table on the cluster while nodes are cut off; return how many of these Ray took for lost."""
    command = on_cluster(table, out, f"{HEAD}:{PORT}", options)
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    shards, lost = options.rows // options.shard_size, 0
    for cut in range(options.cuts):
        due, node = shards * (cut + 1) // (options.cuts + 2), nodes[cut // 2 % 2]
        wait_for(lambda due=due: done(out) >= due or driver.poll() is not None, "further shards")  # type: ignore[misc]
        before = done(out)
        node.link("down")
        if cut % 2 == 0:
            time.sleep(SHORT)
            node.link("up")
            continue
        time.sleep(LONG)
        wait_for(lambda: alive() < 3, "the loss of a node")
        lost += 1
        print(
            f"node {node.number} cut off: {before} of {shards} shards before, {done(out)} when it was lost", flush=True
        )
        node.end()
        node.link("up")
        node.start()
    _, said = driver.communicate()
    if driver.returncode != 0:
        figures.errors += 1
        print(said)
    return lost


def done(out: Path) -> int:
    """Return how many shards are there."""
    return len(shards_in(LocalStore(out))) if out.exists() else 0


def answers() -> bool:
    """Say whether the head listens."""
    try:
        socket.create_connection((HEAD, PORT), 1).close()
    except OSError:
        return False
    return True


def alive() -> int:
    """Return how many nodes Ray has."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def wait_for(happened: object, what: str) -> None:
    """Wait until something is the case."""
    assert callable(happened)
    until = time.monotonic() + AT_MOST
    while not happened():
        if time.monotonic() > until:
            raise TimeoutError(f"no {what} in {AT_MOST:.0f} s")
        time.sleep(0.5)


def remove(nodes: list[Node]) -> None:
    """Remove bridge and namespaces."""
    for command in (["link", "del", BRIDGE], *(["netns", "del", node.name] for node in nodes)):
        subprocess.run(["ip", *command], stderr=subprocess.DEVNULL, check=False)


def ip(*arguments: str) -> None:
    """Run `ip`, which must succeed."""
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
