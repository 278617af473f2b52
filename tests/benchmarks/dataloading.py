"""How long a training loop waits for its pictures: many small ones in tar shards, and a step that only sleeps.

The shards are made in a temporary folder first. Each batch is drawn as the autoencoder's loop draws it: read from the
shards, decoded, cropped, mirrored, recoloured; once ahead in other processes and once in the loop itself, in turns.

python tests/benchmarks/dataloading.py
python tests/benchmarks/dataloading.py --images 2000 --steps 50 --batch-size 32
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentdiff.training.config import AutoencoderTraining
from latentdiff.training.data import dataset
from latentdiff.training.data.pictures import draw_views
from latentdiff.training.data.prefetch import prefetched_by_workers, workers
from PIL import Image

SHARDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures that are trained on, in pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    dataset.IN_MEMORY_BYTES = 0  # as for a set that is larger than that
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        write_shards(Path(place), arguments.images)
        written = time.perf_counter()
        config = AutoencoderTraining.model_validate(
            {
                "stage": "autoencoder",
                "data": {"folder": place, "size": arguments.size},
                "run": {"out": f"{place}/run", "steps": arguments.steps, "batch_size": arguments.batch_size},
                "model": {},
            }
        )
        data = dataset.open_images(config.data, arguments.batch_size, Path(place) / "run")
        opened = time.perf_counter()
        dataset.open_images(config.data, arguments.batch_size, Path(place) / "run")
        print(f"{arguments.images} pictures written in {written - begin:.0f} s, examined in {opened - written:.0f} s")
        draw = partial(draw_views, data, config, [slice(None)])
        print(f"opened again in {time.perf_counter() - opened:.1f} s")
        shares: dict[str, list[float]] = {"ahead": [], "in the loop": []}
        for number in range(arguments.rounds):
            steps = range(number * arguments.steps, (number + 1) * arguments.steps)
            shares["ahead"].append(waited(prefetched_by_workers(draw, steps, workers()), arguments.step_seconds))
            shares["in the loop"].append(waited(map(draw, steps), arguments.step_seconds))
    figures: dict[str, Any] = {"device": "cpu", "processes": workers(), "torch_threads": torch.get_num_threads()}
    figures |= vars(arguments) | {"examined_s": opened - written}
    for name, values in shares.items():
        median = statistics.median(values)
        print(f"{name}: {median:.2%} of the time is waiting for data ({min(values):.2%} to {max(values):.2%})")
        figures[f"waited_{name.replace(' ', '_')}"] = median
    print(json.dumps(figures))


def write_shards(folder: Path, count: int) -> None:
    """Write JPEG pictures of 80 to 160 pixels, blurred noise, with captions, in `SHARDS` tar files."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                width, height = rng.integers(80, 161, 2)
                stream = io.BytesIO()
                small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(stream, format="JPEG")
                for name, content in ((f"{number}.jpg", stream.getvalue()), (f"{number}.txt", b"a picture")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def waited(batches: Iterator[np.ndarray], step_seconds: float) -> float:
    """Return the share of a loop's time that it waits for the next batch, without the first one, which starts it."""
    next(batches)
    begin, waiting = time.perf_counter(), 0.0
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        waiting += time.perf_counter() - asked
        time.sleep(step_seconds)
    return waiting / (time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())
