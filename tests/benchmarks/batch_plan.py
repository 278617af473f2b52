"""Measure the planning of `latentdiff batch`: a job of a million rows that is done, given again.

    python tests/benchmarks/batch_plan.py
    python tests/benchmarks/batch_plan.py --rows 100000 --kind csv

The shards are made by the code that makes real ones, of rows that all failed, so that there are no pictures: what is
measured is reading the table, naming every picture and comparing the shards with the manifests. Seconds, and the most
memory of a process that does nothing else; planning needs no torch. Prints the figures and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

KINDS = ("jsonl", "csv", "txt", "parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--kind", choices=KINDS, default="jsonl")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(Path(options.measure), options.kind, options.shard_size)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place, options.kind, options.rows, options.shard_size)
        command = [sys.executable, __file__, "--measure", folder, "--kind", options.kind]
        ended = subprocess.run(
            [*command, "--shard-size", str(options.shard_size)], capture_output=True, text=True, check=True
        )
    figures = json.loads(ended.stdout.splitlines()[-1])
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{options.rows:,} rows ({options.kind}), {figures['missing']} missing: {figures['seconds']:.1f} s ({load})")
    print(f"{figures['cpu_seconds']:.1f} s of CPU time, which others on the machine take no part of")
    print(f"of these {figures['start']:.1f} s to start; most memory {figures['megabytes']:.0f} MB")
    print(json.dumps({"rows": options.rows, "kind": options.kind, **figures}))


def make(place: Path, kind: str, rows: int, shard_size: int) -> None:
    """Write the table, and the output of a job that is done."""
    from latentdiff.scale.manifest import MANIFESTS, Manifest, file_of
    from latentdiff.scale.plan import Layout, read_shards
    from latentdiff.scale.rows import Columns, Maker
    from latentdiff.scale.table import open_table

    table = place / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"prompt": [f"picture {n}" for n in range(rows)], "seed": range(rows)}), table)
    else:
        line = {"jsonl": '{{"prompt": "picture {0}", "seed": {0}}}', "csv": "picture {0},{0}", "txt": "picture {0}"}[
            kind
        ]
        with table.open("w") as file:
            file.write("prompt,seed\n" if kind == "csv" else "")
            file.writelines(line.format(number) + "\n" for number in range(rows))
    out = place / "out"
    for folder in (MANIFESTS, "shards"):
        (out / folder).mkdir(parents=True)
    layout = Layout(Maker({"model_hash": "0"}), Columns(), "webdataset", shard_size)
    for shard in read_shards(open_table(str(table)), layout):
        entries = [{"row": row.number, "name": name, "failed": "-"} for row, name in zip(shard.rows, shard.names)]
        (out / file_of(shard.name)).write_bytes(Manifest(shard.name, "webdataset", {}, entries).render())
        (out / "shards" / f"{shard.name}.tar").touch()


def measure(place: Path, kind: str, shard_size: int) -> None:
    """Plan, in a process of its own, and print the figures."""
    begun = time.perf_counter()
    from latentdiff.scale.plan import Layout, make_plan
    from latentdiff.scale.rows import Columns, Maker
    from latentdiff.scale.store import LocalStore
    from latentdiff.scale.table import open_table

    layout = Layout(Maker({"model_hash": "0"}), Columns(), "webdataset", shard_size)
    started = time.perf_counter()
    plan = make_plan(open_table(str(place / f"rows.{kind}")), layout, LocalStore(place / "out"))
    ended = time.perf_counter()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = time.process_time()  # of this process from its start on
    figures = {
        "seconds": ended - begun,
        "cpu_seconds": cpu,
        "start": started - begun,
        "megabytes": most,
        "missing": plan.missing_rows,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
