"""Time from shell prompt to PNG: ours against diffusers with the same model, sampler, steps and guidance.

    python tests/benchmarks/cold_start.py
    python tests/benchmarks/cold_start.py --runs 9 --model runs/emoji-diffusion/model
    python tests/benchmarks/cold_start.py --engines    # PyTorch as it is, OpenVINO with torch, and without

Whole processes, A B A B after a warm-up, two where OpenVINO converts first; prints median, range, peak memory,
the median ratio to the first, and a JSON line.
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
from importlib.metadata import version
from pathlib import Path

from latentdiff.embedded import embedded_model  # and no torch: the peak of a process that is started begins with ours

PEER = """
import sys, torch
from diffusers import {scheduler}, StableDiffusionPipeline
model, out, steps, guidance = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config)
generator = torch.Generator("cpu").manual_seed(0)
picture = pipe("a red fox", num_inference_steps=steps, guidance_scale=guidance, generator=generator).images[0]
picture.save(out)
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
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LATENTDIFF_CACHE"] = f"{folder}/cache"
        ways = _engines(arguments.model, Path(folder)) if arguments.engines else _peers(arguments.model, Path(folder))
        settings = _settings(next(iter(ways.values())))
        for command in [*ways.values()] * (2 if arguments.engines else 1):
            _run(command)
        rounds = [{name: _run(command) for name, command in ways.items()} for _ in range(arguments.runs)]
        if arguments.engines:
            with_torch, without = (Path(folder, f"{name}.png").read_bytes() for name in ("openvino", "without torch"))
            print(f"OpenVINO with torch and without write the same file: {with_torch == without}")
    cores = f"{os.cpu_count()} cores with a load of {load:.1f}"
    print(f"{platform.processor() or platform.machine()}, {cores}, torch {version('torch')}, {settings}")
    results, first = {}, next(iter(ways))
    for name in ways:
        seconds, peaks = zip(*(one[name] for one in rounds))
        median, peak = statistics.median(seconds), max(peaks)
        ratio = statistics.median(one[name][0] / one[first][0] for one in rounds)
        spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
        print(f"{name:13} median {median:.2f} s {spread}, {ratio:.2f} of {first}, peak {peak:.0f} MB")
        results[name] = {"median_s": round(median, 3), "ratio": round(ratio, 3), "peak_mb": round(peak)}
    print(json.dumps(results))


def _ours(model: str, out: Path, *more: str) -> list[str]:
    return ["generate", "a red fox", "--model", model, "-o", str(out), *more]


def _peers(model: str, folder: Path) -> dict[str, list[str]]:
    """Return the commands that draw with latentdiff and with diffusers."""
    ours = [sys.executable, "-m", "latentdiff", *_ours(model, folder / "latentdiff.png")]
    settings = _settings(ours)
    script = folder / "peer.py"
    script.write_text(PEER.format(scheduler=PEER_SCHEDULER))
    peer = [sys.executable, str(script), model, str(folder / "diffusers.png")]
    return {"latentdiff": ours, "diffusers": [*peer, *(str(settings[key]) for key in PEER_SETTINGS)]}


def _engines(model: str, folder: Path) -> dict[str, list[str]]:
    """Return the commands that draw with PyTorch as it is, and by OpenVINO with torch and without."""
    plain, with_torch = [sys.executable, "-m", "latentdiff"], [sys.executable, "-c", WITH_TORCH]
    starts = {"eager": plain, "openvino": with_torch, "without torch": plain}
    engines = {name: () if name == "eager" else ("--engine", "openvino") for name in starts}
    return {name: [*start, *_ours(model, folder / f"{name}.png", *engines[name])] for name, start in starts.items()}


def _settings(command: list[str]) -> dict[str, object]:
    """Ask one run for the default settings, so that the peer gets the same."""
    output = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
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
