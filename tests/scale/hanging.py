"""A program for a test: a job on a Ray cluster, one of whose workers hangs, and what the metrics of Ray say of it.

    python -m tests.scale.hanging FOLDER

draws a table into FOLDER/out; the first worker to draw `slow` makes FOLDER/mark and hangs. Prints metrics.
In a process of its own, as Ray keeps threads.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from latentdiff.scale import stragglers
from latentdiff.scale.batch import How, run_batch
from latentdiff.scale.cluster import Cluster
from latentdiff.scale.rows import Row
from latentdiff.scale.worker import Crew
from tests.scale.small import Scribe, small_job, write_table
from tests.two_processes import free_port

MARK = "LATENTDIFF_TEST_MARK"
ROWS = [{"prompt": "slow" if number == 3 else f"{number}", "seed": number} for number in range(24)]
PATIENCE = 30.0  # seconds in which Ray publishes metrics


class Hanging(Scribe):
    """Draws, but the first to draw the prompt `slow` hangs."""

    def draw(self, rows: Sequence[Row]) -> Iterator[Any]:
        mark = Path(os.environ[MARK])
        if any(row.prompt == "slow" for row in rows) and not mark.exists():
            mark.touch()
            time.sleep(600)
        yield from super().draw(rows)


def hang() -> None:
    """Have a worker of Ray draw as `Hanging`, and take little time for late."""
    Crew.artist = lambda crew, begins=None: Hanging(begins=begins)  # type: ignore[method-assign, assignment]
    stragglers.LEAST_SECONDS = 1.0


def main(folder: Path) -> None:
    """Draw, and print the metrics."""
    import ray

    port, os.environ[MARK] = free_port(), str(folder / "mark")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": "tests.scale.hanging.hang"},
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    table, cluster = write_table(folder / "rows.jsonl", ROWS), Cluster(workers=2)
    summary = run_batch(table, str(folder / "out"), small_job(), How(engine=cluster, tell=cluster.tell))
    assert (summary.drawn, summary.shards) == (len(ROWS), len(ROWS) // 2), summary
    until, lines = time.monotonic() + PATIENCE, list[str]()
    while not lines and time.monotonic() < until:
        time.sleep(1.0)
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_latentdiff_batch_done{")]
    print("\n".join(lines))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
