"""Time from shell prompt to PNG: ours against diffusers with the same model, sampler, steps and guidance.

    python tests/benchmarks/cold_start.py
    python tests/benchmarks/cold_start.py --runs 9 --model runs/emoji-diffusion/model
    python tests/benchmarks/cold_start.py --engines    # PyTorch as it is, OpenVINO with torch, and without
    python tests/benchmarks/cold_start.py --busy 3     # and each again beside three processes that only compute
    python tests/benchmarks/cold_start.py --pictures 100 --runs 1

Whole processes, A B A B after a warm-up, two where OpenVINO converts first; prints median, range, peak memory,
the median ratio to the first, and a JSON line. diffusers draws several pictures in batches of eight.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from latentdiff.embedded import embedded_model  # and no torch: the peak of a process that is started begins with ours

PEER = """
import sys, torch
from diffusers import {scheduler}, StableDiffusionPipeline
model, out, count, steps, guidance = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), float(sys.argv[5])
pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)
generator = torch.Generator("cpu").manual_seed(0)
asked = dict(num_inference_steps=steps, guidance_scale=guidance, generator=generator)
for first in range(0, count, 8):
    pictures = pipe("a red fox", num_images_per_prompt=min(8, count - first), **asked).images
    for number, picture in enumerate(pictures, first):
        picture.save(out if count == 1 else f"{{out}}/{{number}}.png")
"""
PEER_SCHEDULER = "DPMSolverMultistepScheduler"
PEER_SETTINGS = ("num_inference_steps", "guidance_scale")


# `latentdiff` as if there were no recipes.
WITH_TORCH = """
import sys
from latentdiff import __main__
from latentdiff.commands import generate
generate._recipe_place = lambda options, chosen: None
sys.exit(__main__.main())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--engines", action="store_true", help="compare engines, diffusers left out")
    parser.add_argument("--busy", type=int, default=0, help="measure again beside so many busy processes")
    parser.add_argument("--pictures", type=int, default=1, help="that each process draws")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LATENTDIFF_CACHE"] = f"{folder}/cache"
        make = _engines if arguments.engines else _peers
        settings = _settings(arguments.model, Path(folder))
        several = arguments.engines or arguments.pictures > 1  # of which OpenVINO converts first
        for command in [*make(arguments.model, Path(folder), min(4, arguments.pictures)).values()] * (1 + several):
            _run(command)
        ways = make(arguments.model, Path(folder), arguments.pictures)
        rounds = list[dict[str, tuple[float, float]]]()
        for _ in range(arguments.runs):
            rounds.append({name: _run(command) for name, command in ways.items()})
            if arguments.busy:
                with _beside(arguments.busy):
                    rounds[-1] |= {f"{name}, busy": _run(command) for name, command in ways.items()}
        if arguments.engines and arguments.pictures == 1:
            with_torch, without = (Path(folder, f"{name}.png").read_bytes() for name in ("openvino", "without torch"))
            print(f"OpenVINO with torch and without write the same file: {with_torch == without}")
    cores = f"{os.cpu_count()} cores with a load of {load:.1f}"
    print(f"{platform.processor() or platform.machine()}, {cores}, torch {version('torch')}, {settings}")
    results, first = {}, next(iter(ways))
    for name in rounds[0]:
        seconds, peaks = zip(*(one[name] for one in rounds))
        median, peak = statistics.median(seconds), max(peaks)
        ratio = statistics.median(one[name][0] / one[first][0] for one in rounds)
        spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
        rate = f", {arguments.pictures / median:.2f} pictures/s" if arguments.pictures > 1 else ""
        print(f"{name:20} median {median:.2f} s {spread}, {ratio:.2f} of {first}, peak {peak:.0f} MB{rate}")
        results[name] = {"median_s": round(median, 3), "ratio": round(ratio, 3), "peak_mb": round(peak)}
    print(json.dumps(results))


@contextmanager
def _beside(count: int) -> Iterator[None]:
    """Have so many processes compute meanwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _ours(model: str, out: Path, pictures: int, *more: str) -> list[str]:
    place = out if pictures > 1 else out.with_name(f"{out.name}.png")
    if pictures > 1:
        out.mkdir(exist_ok=True)
    return ["generate", "a red fox", "--model", model, "-n", str(pictures), "-o", str(place), *more]


def _peers(model: str, folder: Path, pictures: int) -> dict[str, list[str]]:
    """Return the commands that draw with latentdiff and with diffusers."""
    ours = [sys.executable, "-m", "latentdiff", *_ours(model, folder / "latentdiff", pictures)]
    settings = _settings(model, folder)
    script, out = folder / "peer.py", folder / ("diffusers" if pictures > 1 else "diffusers.png")
    script.write_text(PEER.format(scheduler=PEER_SCHEDULER))
    if pictures > 1:
        out.mkdir(exist_ok=True)
    peer = [sys.executable, str(script), model, str(out), str(pictures)]
    ways = {} if pictures > 1 else {"latentdiff": ours}
    ways |= {"diffusers": [*peer, *(str(settings[key]) for key in PEER_SETTINGS)]}
    if pictures > 1:
        dtypes = ["float32", *(["bfloat16"] if "avx512_bf16" in Path("/proc/cpuinfo").read_text() else [])]
        for engine in ["eager", *(["openvino"] if find_spec("openvino") is not None else [])]:
            ways |= {f"{engine}, {dtype}": [*ours, "--engine", engine, "--dtype", dtype] for dtype in dtypes}
    return ways


def _engines(model: str, folder: Path, pictures: int) -> dict[str, list[str]]:
    """Return the commands that draw with PyTorch as it is, and by OpenVINO with torch and without."""
    plain, with_torch = [sys.executable, "-m", "latentdiff"], [sys.executable, "-c", WITH_TORCH]
    starts = {"eager": plain, "openvino": with_torch, "without torch": plain}
    engines = {name: () if name == "eager" else ("--engine", "openvino") for name in starts}
    return {name: [*start, *_ours(model, folder / name, pictures, *engines[name])] for name, start in starts.items()}


def _settings(model: str, folder: Path) -> dict[str, object]:
    """Ask one run for the default settings, so that the peer gets the same."""
    command = [sys.executable, "-m", "latentdiff", *_ours(model, folder / "settings", 1), "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = json.loads(output.splitlines()[-1])["settings"]
    return {key: settings[key] for key in ("num_inference_steps", "guidance_scale", "sampler", "height", "width")}


def _run(command: list[str]) -> tuple[float, float]:
    """Run a command to its end and return wall seconds and peak resident megabytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
