"""Load a scheduler with clients that each ask for the next picture when they have the last one, and a lock likewise.

python tests/benchmarks/serve_load.py --model embedded --steps 8
python tests/benchmarks/serve_load.py --clients 1,4 --pictures 2 --model path/to/model --device cuda

For each number of clients it prints, for the scheduler and for the pipeline behind a lock, pictures per second, the
time from asking for a picture to having it (median and 95th percentile), the time to its first step, and how late an
event loop of asyncio in the same process is meanwhile. Pictures are drawn once before anything is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from latentdiff import Pipeline
from latentdiff.serve.scheduler import Scheduler

PROMPTS = ("a red fox", "a boat on a lake", "an old oak", "a bowl of apples")
TICK = 0.005  # seconds that the event loop sleeps

# (client, number of the picture) -> seconds to its first step
Draw = Callable[[int, int], float]


def options(client: int, number: int, steps: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[(client + number) % len(PROMPTS)],
        "seed": 1000 * client + number,
        "num_inference_steps": steps,
    }


def with_scheduler(scheduler: Scheduler, steps: int) -> Draw:
    def draw(client: int, number: int) -> float:
        job = scheduler.submit(client=str(client), **options(client, number, steps))
        first = [0.0]
        job.listen(lambda event: first.append(time.monotonic()) if event.kind == "admitted" else None)
        job.result()
        return first[-1] - job.submitted

    return draw


def with_lock(pipe: Pipeline, steps: int) -> Draw:
    lock = threading.Lock()

    def draw(client: int, number: int) -> float:
        asked = time.monotonic()
        with lock:
            begun = time.monotonic()
            pipe(**options(client, number, steps))
        return begun - asked

    return draw


def load(draw: Draw, clients: int, pictures: int) -> dict[str, float]:
    """Return the figures of some clients that draw some pictures each, one after the other."""
    times, waits = list[float](), list[float]()

    def client(own: int) -> None:
        for number in range(pictures):
            begun = time.monotonic()
            waits.append(draw(own, number))
            times.append(time.monotonic() - begun)

    with ThreadPoolExecutor(clients) as pool:
        begun = time.monotonic()
        running = [pool.submit(client, own) for own in range(clients)]
        late = asyncio.run(lateness(lambda: all(one.done() for one in running)))
        for one in running:
            one.result()
        seconds = time.monotonic() - begun
    return {
        "pictures_per_second": clients * pictures / seconds,
        "picture_p50": share(times, 0.5),
        "picture_p95": share(times, 0.95),
        "admission_p50": share(waits, 0.5),
        "admission_p95": share(waits, 0.95),
        "event_loop_late_p99": share(late, 0.99),
    }


async def lateness(done: Callable[[], bool]) -> list[float]:
    """Return by how many seconds an event loop woke late, each time that it slept."""
    late = list[float]()
    while not done():
        begun = time.monotonic()
        await asyncio.sleep(TICK)
        late.append(time.monotonic() - begun - TICK)
    return late


def share(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", default="1,2,4,8,16")
    parser.add_argument("--pictures", type=int, default=2, help="of each client")
    arguments = parser.parse_args()
    model = None if arguments.model == "embedded" else arguments.model
    pipe = Pipeline.from_pretrained(model, device=arguments.device, dtype=arguments.dtype)
    figures: dict[str, Any] = {"device": str(pipe.device), "threads": torch.get_num_threads(), "steps": arguments.steps}
    with Scheduler(pipe, batch=arguments.batch, queue=10_000) as scheduler:
        ways = {"lock": with_lock(pipe, arguments.steps), "scheduler": with_scheduler(scheduler, arguments.steps)}
        for draw in ways.values():
            draw(0, 0)
        for clients in (int(count) for count in arguments.clients.split(",")):
            for name, draw in ways.items():
                found = figures[f"{name} {clients}"] = load(draw, clients, arguments.pictures)
                print(f"{clients:3} clients, {name:9}", *(f"{key} {value:.3f}" for key, value in found.items()))
        stats = scheduler.stats()
    figures["scheduler"] = {"batch_fill": stats.batch_fill, "step_seconds": stats.step_seconds}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
