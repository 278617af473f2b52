"""Load three servers with clients, in turn: ours, our pipeline behind a lock, and diffusers' behind a lock.

    pip install -e '.[serve]' diffusers
    python tests/benchmarks/serve_load.py                       # embedded model, 25 steps
    python tests/benchmarks/serve_load.py --model narrow        # blocks of Stable Diffusion 1.5, a fifth as wide
    python tests/benchmarks/serve_load.py --clients 1,4 --pictures 2 --rounds 1 --rate 0

All draw the same pictures from the same folder over the same HTTP. Closed loop: each client asks for the next picture
when it has the last one. Open loop: requests come at random times, on average as many a second as `--rate` says, in
shares of what the pipeline behind a lock did with one client; they do not wait for each other. For every round and
number of clients the servers are loaded one after the other, so that what else the machine does meets all alike; the
figures are medians over the rounds. Memory is that of the server's process, resident.
"""

import argparse
import base64
import io
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import requests
import torch
from requests.adapters import HTTPAdapter

from latentdiff import Pipeline, load_pipeline, save_pipeline
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

KINDS = ("scheduler", "lock", "diffusers")
PROMPTS = ("a red fox", "a boat on a lake", "an old oak", "a bowl of apples")
ROUTE = "/v1/images/generations"
MEMORY_EVERY = 0.25  # seconds
READY = 180  # seconds
NARROW = {"block_out_channels": [64, 128, 256, 256], "attention_head_dim": 8, "layers_per_block": 2, "sample_size": 16}


@dataclass
class Served:
    """A server in a process of its own."""

    url: str
    process: psutil.Process

    def draw(self, session: requests.Session, number: int, steps: int) -> float:
        """Ask for a picture and return how long it took, in seconds."""
        body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "steps": steps, "size": "auto"}
        begun = time.monotonic()
        answer = session.post(self.url + ROUTE, json=body, timeout=READY)
        answer.raise_for_status()
        base64.b64decode(answer.json()["data"][0]["b64_json"], validate=True)
        return time.monotonic() - begun

    def told(self) -> dict[str, float]:
        """Return what our server says: how many jobs came to a first step, how long they waited, and of its steps."""
        text = requests.get(f"{self.url}/metrics", timeout=READY).text
        patterns = {
            "admissions": "admission_seconds_count",
            "waited": "admission_seconds_sum",
            "step_seconds": "latentdiff_step_seconds",
            "batch_fill": "latentdiff_batch_fill",
        }
        matches = {name: re.search(rf"^\w*{pattern} (\S+)", text, re.MULTILINE) for name, pattern in patterns.items()}
        return {name: float(match[1]) for name, match in matches.items() if match}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, narrow or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", default="1,2,4,8,16,32")
    parser.add_argument("--pictures", type=int, default=3, help="of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", default="0.5,0.9", help="of the open loop; 0 for none")
    parser.add_argument("--seconds", type=float, default=30, help="of the open loop")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--serve", choices=KINDS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_behind_lock(arguments.serve, arguments.model, arguments.device, arguments.port)
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Start the servers, load them and print the figures."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = model_folder(arguments.model, folder / "narrow")
        kinds = arguments.kinds.split(",")
        servers = {kind: stack.enter_context(started(kind, model, arguments)) for kind in kinds}
        alone = {kind: warm(server, arguments.steps) for kind, server in servers.items()}
        for turn in range(arguments.rounds):
            for clients in map(int, arguments.clients.split(",")):
                for kind in kinds[:: 1 if turn % 2 == 0 else -1]:
                    name = f"closed, {clients:2} clients, {kind}"
                    found[name].append(closed(servers[kind], clients, arguments.pictures, arguments.steps))
                    show(name, found[name][-1])
        for share in (float(rate) for rate in arguments.rate.split(",") if float(rate)):
            for kind in kinds:
                name = f"open, {share:.2f} of one client's rate, {kind}"
                found[name].append(opened(servers[kind], share / alone["lock"], arguments.seconds, arguments.steps))
                show(name, found[name][-1])
    medians = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    print("\nmedians")
    for name, figures in medians.items():
        show(name, figures)
    print(
        json.dumps({"threads": torch.get_num_threads(), "steps": arguments.steps, "model": arguments.model, **medians})
    )


def show(name: str, figures: dict[str, float]) -> None:
    print(f"{name:45}", *(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)


def warm(server: Served, steps: int) -> float:
    """Draw two pictures, and return how many seconds the second took."""
    with requests.Session() as session:
        server.draw(session, 0, steps)
        return server.draw(session, 1, steps)


@contextmanager
def address(number: int) -> Iterator[requests.Session]:
    """Give a client with an address of its own, as clients are told apart by it, and each may have so many jobs."""
    adapter = HTTPAdapter()
    adapter.init_poolmanager(1, 1, source_address=(f"127.1.{number // 200}.{number % 200 + 1}", 0))
    with requests.Session() as session:
        session.mount("http://", adapter)
        yield session


def closed(server: Served, clients: int, pictures: int, steps: int) -> dict[str, float]:
    """Return the figures of clients that draw some pictures each, one after the other."""

    def client(own: int) -> list[float]:
        with address(own) as session:
            return [server.draw(session, own * pictures + number, steps) for number in range(pictures)]

    before = server.told()
    with watched(server) as memory, ThreadPoolExecutor(clients) as pool:
        begun = time.monotonic()
        times = [seconds for one in pool.map(client, range(clients)) for seconds in one]
        spent = time.monotonic() - begun
    return figures_of(server, before, times, spent, memory)


def opened(server: Served, rate: float, seconds: float, steps: int) -> dict[str, float]:
    """Return the figures of requests that come at random times, so many a second."""
    rng, moments = random.Random(0), [0.0]
    while moments[-1] < seconds:
        moments.append(moments[-1] + rng.expovariate(rate))

    def ask(number: int) -> float:
        with address(number) as session:
            time.sleep(max(0.0, begun + moments[number] - time.monotonic()))
            return server.draw(session, number, steps)

    before = server.told()
    with watched(server) as memory, ThreadPoolExecutor(len(moments)) as pool:
        begun = time.monotonic()
        times = list(pool.map(ask, range(len(moments))))
        spent = time.monotonic() - begun
    return figures_of(server, before, times, spent, memory)


def figures_of(
    server: Served, before: dict[str, float], times: list[float], spent: float, memory: list[float]
) -> dict[str, float]:
    figures = {"pictures_per_second": len(times) / spent}
    figures |= {f"p{share:.0f}": at(times, share / 100) for share in (50, 95, 99)}
    told = server.told()
    if told:
        admitted, waited = (told.pop(name) - before[name] for name in ("admissions", "waited"))
        told["admission"] = waited / admitted
        told["admission_steps"] = told["admission"] / told["step_seconds"]
    return figures | {"megabytes": max(memory), "megabytes_grown": memory[-1] - memory[0]} | told


def at(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(math.ceil(share * len(ordered)) - 1, len(ordered) - 1)]


@contextmanager
def watched(server: Served) -> Iterator[list[float]]:
    """Give the resident megabytes of a server's process, added to while the block runs."""
    end, seen = threading.Event(), [server.process.memory_info().rss / 1e6]

    def watch() -> None:
        while not end.wait(MEMORY_EVERY):
            seen.append(server.process.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join()


@contextmanager
def started(kind: str, model: str, arguments: argparse.Namespace) -> Iterator[Served]:
    """Start a server of a kind in a process of its own, and end it."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ["--model", model, "--device", arguments.device, "--port", port]
    if kind == "scheduler":
        command = ["-m", "latentdiff", "serve", *common, "--batch", str(arguments.batch), "--no-ui"]
    else:
        command = [__file__, *common, "--serve", kind]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    try:
        url, limit = f"http://127.0.0.1:{port}", time.monotonic() + READY
        while not answers(url):
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"the server {kind} did not start")
            time.sleep(0.2)
        yield Served(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=5).ok
    except requests.ConnectionError:
        return False


def model_folder(name: str, place: Path) -> str:
    """Return the folder of a model that both libraries load; "narrow" is made there with random weights."""
    if name == "embedded":
        return str(Path(__file__).parents[2] / "assets/emoji")
    if name == "narrow":
        base = load_pipeline(None)
        shape = UNetConfig.from_dict({"cross_attention_dim": base.unet.config.cross_attention_dim, **NARROW})
        torch.manual_seed(0)
        save_pipeline(replace(base, unet=UNet2DConditionModel(shape)), place, dtype=torch.float32)
        return str(place)
    return name


def serve_behind_lock(kind: str, model: str, device: str, port: int) -> None:
    """Serve a pipeline by a route like ours, one picture at a time."""
    import uvicorn
    from fastapi import Body, FastAPI, Response

    draw, lock, app = drawing(kind, model, device), threading.Lock(), FastAPI()

    @app.get("/readyz")
    def ready() -> Response:
        return Response()

    @app.get("/metrics")
    def metrics() -> Response:
        return Response()

    @app.post(ROUTE)
    def generate(body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        with lock:
            image = draw(body["prompt"], body["seed"], body["steps"])
        image.save(file := io.BytesIO(), "PNG")
        return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def drawing(kind: str, model: str, device: str) -> Callable[[str, int, int], Any]:
    """Return a function of prompt, seed and steps that draws a picture."""
    if kind == "lock":
        pipe = Pipeline.from_pretrained(model, device=device)
        return lambda prompt, seed, steps: pipe(prompt, seed=seed, num_inference_steps=steps).images[0]
    os.environ["HF_HUB_OFFLINE"] = "1"
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(model).to(device)
    theirs.scheduler = EulerAncestralDiscreteScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)

    def draw(prompt: str, seed: int, steps: int) -> Any:
        noise = torch.Generator().manual_seed(seed)
        return theirs(prompt, num_inference_steps=steps, guidance_scale=7.5, generator=noise).images[0]

    return draw


if __name__ == "__main__":
    main()
