"""Pictures per second of `latentdiff batch`: processes and Ray actors against one process of the Pipeline in a loop.

    python tests/benchmarks/batch_speed.py
    python tests/benchmarks/batch_speed.py --rows 64 --steps 4 --rounds 2 --ways loop local

Draws the same rows with the embedded model in turn (A B C A B C), each way in a process of its own: `loop` calls the
Pipeline prompt by prompt and saves each picture, `local` and `ray` are `latentdiff batch` with workers of one thread,
`diffusers` is its pipeline in Ray Data's pattern: actors that `map_batches` calls, each of which saves its pictures;
`openvino` and `openvino-ray` are `local` and `ray` with `--model-engine openvino`.
What is timed is the drawing, from the moment when all have their model (their first shard) to the last picture; what a
start takes is told apart. Then the share of planning and commit: the same job with pictures that take no time to draw.
Prints the figures and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

WAYS = ("loop", "local", "ray", "diffusers", "openvino", "openvino-ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="whose drawing is timed, in each way and round")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--shard-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS[:3]])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(MEASURES[options.measure](options)))
        return
    rates: dict[str, list[float]] = {way: [] for way in options.ways}
    starts: dict[str, list[float]] = {way: [] for way in options.ways}
    for number in range(options.rounds):
        for way in options.ways:
            found = in_a_process(way)
            rates[way].append(found["rate"])
            starts[way].append(found["start"])
            print(
                f"round {number + 1}, {way}: {found['rate']:.2f} pictures/s, start {found['start']:.1f} s", flush=True
            )
    overhead = in_a_process("overhead")["milliseconds"]
    for way, values in rates.items():
        ratio = statistics.median(values) / statistics.median(rates[options.ways[0]])
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{way}: median {statistics.median(values):.2f} ({spread}) pictures/s, {ratio:.2f} of {options.ways[0]}")
    print(f"planning and commit: {overhead:.2f} ms a picture; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(json.dumps({"rates": rates, "starts": starts, "overhead_ms": overhead, "steps": options.steps}))


def in_a_process(what: str) -> dict[str, Any]:
    """Measure in a process of its own and return the figures."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def rows_of(count: int) -> list[dict[str, Any]]:
    """Return rows to draw."""
    return [{"prompt": f"a red fox, number {number}", "seed": number} for number in range(count)]


def loop(options: argparse.Namespace) -> dict[str, float]:
    """Draw one by one, as a script of a user does."""
    import torch

    begun = time.perf_counter()
    from latentdiff.pipeline import Pipeline

    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(device="cpu")
    pipe("warm", num_inference_steps=1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for row in rows_of(options.rows):
            drawn = pipe(row["prompt"], seed=row["seed"], num_inference_steps=options.steps)
            drawn.save(f"{folder}/{row['seed']}.png")
    return {"rate": options.rows / (time.perf_counter() - started), "start": started - begun}


def batch(options: argparse.Namespace, engine: Any = None, model_engine: str = "eager") -> dict[str, float]:
    """Draw by a job; rows are counted from the first shard of each worker on, by the times of manifests."""
    from latentdiff.scale.batch import How, run_batch
    from latentdiff.scale.job import Job
    from latentdiff.scale.model import Model
    from tests.scale.small import write_table

    begun, first = time.time(), options.workers  # shards before the clock starts
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder) / "rows.jsonl", rows_of(options.rows + first * options.shard_size))
        job = Job(
            Model(device="cpu", engine=model_engine),
            {"num_inference_steps": options.steps},
            shard_size=options.shard_size,
            batch=options.batch,
        )
        how = How(engine=engine, workers=options.workers, say=lambda line: None)
        run_batch(table, f"{folder}/out", job, how)
        ends = sorted(file.stat().st_mtime for file in Path(folder, "out/manifests").iterdir())
    seconds = ends[-1] - ends[first - 1]
    return {"rate": (len(ends) - first) * options.shard_size / seconds, "start": ends[0] - begun}


def ray(options: argparse.Namespace, model_engine: str = "eager") -> dict[str, float]:
    """Draw on a cluster of this machine."""
    from latentdiff.scale.cluster import Cluster

    return batch(options, Cluster(workers=options.workers), model_engine)


class Peer:
    """An actor that draws with diffusers and saves what it draws.

    Args:
        folder: where pictures go.
        steps: of each.
    """

    def __init__(self, folder: str, steps: int) -> None:
        import diffusers
        import torch

        from latentdiff.embedded import embedded_model

        torch.set_num_threads(1)
        self.folder, self.steps = folder, steps
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(embedded_model(), torch_dtype=torch.float32)
        self.pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Draw a batch of prompts."""
        import torch

        generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
        drawn = self.pipe(
            [str(prompt) for prompt in batch["prompt"]], num_inference_steps=self.steps, generator=generators
        )
        for image, seed in zip(drawn.images, batch["seed"]):
            image.save(f"{self.folder}/{seed}.png")
        return {"seed": batch["seed"]}


def diffusers(options: argparse.Namespace) -> dict[str, float]:
    """Draw with diffusers in actors of Ray Data; rows are counted from the first batch of each on."""
    import logging

    import ray.data

    begun, first = time.time(), options.workers * options.batch
    ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = rows_of(options.rows + first)
    with tempfile.TemporaryDirectory() as folder:
        drawn = ray.data.from_items(rows, override_num_blocks=len(rows) // options.batch).map_batches(
            Peer,
            fn_constructor_kwargs={"folder": folder, "steps": options.steps},
            batch_size=options.batch,
            compute=ray.data.ActorPoolStrategy(size=options.workers),
            num_cpus=1,
        )
        assert drawn.materialize().count() == len(rows)
        ends = sorted(file.stat().st_mtime for file in Path(folder).iterdir())
    return {"rate": (len(ends) - first) / (ends[-1] - ends[first - 1]), "start": ends[0] - begun}


def overhead(options: argparse.Namespace) -> dict[str, float]:
    """Plan and commit pictures of a usual size that take no time to draw."""
    from latentdiff.scale.batch import How, run_batch
    from latentdiff.scale.formats import Picture
    from latentdiff.scale.job import Job
    from latentdiff.scale.model import Model
    from latentdiff.scale.worker import Crew
    from tests.scale.small import write_table

    class Ready:
        def draw(self, rows: Sequence[Any]) -> Iterator[Picture]:
            for row in rows:
                yield Picture(bytes(9000), {"prompt": row.prompt, "seed": row.settings["seed"]})

    Crew.artist = lambda crew, begins=None: Ready()  # type: ignore[method-assign, assignment, return-value]
    count = 4096
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder) / "rows.jsonl", rows_of(count))
        begun = time.process_time()
        run_batch(table, f"{folder}/out", Job(Model(device="cpu"), {}), How(workers=0, say=lambda line: None))
        return {"milliseconds": (time.process_time() - begun) / count * 1000}


MEASURES = {
    "loop": loop,
    "local": batch,
    "ray": ray,
    "diffusers": diffusers,
    "openvino": partial(batch, model_engine="openvino"),
    "openvino-ray": partial(ray, model_engine="openvino"),
    "overhead": overhead,
}

if __name__ == "__main__":
    main()
