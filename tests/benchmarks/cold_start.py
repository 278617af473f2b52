"""Time from shell prompt to PNG: ours against diffusers with the same model, sampler, steps and guidance.

    python tests/benchmarks/cold_start.py
    python tests/benchmarks/cold_start.py --runs 9 --model runs/emoji-diffusion/model

Whole processes, A B A B after one warm-up of each; prints median, range, peak memory, the median ratio of the pairs and
a JSON line.
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
from pathlib import Path

import torch

from latentdiff.checkpoints import embedded_model

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", default=str(embedded_model()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours_png, peer_png = f"{folder}/ours.png", f"{folder}/peer.png"
        ours = [sys.executable, "-m", "latentdiff", "generate", "a red fox", "--model", arguments.model, "-o", ours_png]
        settings = _settings(ours)
        script = Path(folder) / "peer.py"
        script.write_text(PEER.format(scheduler=PEER_SCHEDULER))
        peer = [sys.executable, str(script), arguments.model, peer_png]
        peer += [str(settings["num_inference_steps"]), str(settings["guidance_scale"])]
        _run(ours), _run(peer)
        pairs = [(_run(ours), _run(peer)) for _ in range(arguments.runs)]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {settings}"
    )
    results = {}
    for index, name in enumerate(("latentdiff", "diffusers")):
        seconds, peaks = zip(*(pair[index] for pair in pairs))
        median = statistics.median(seconds)
        print(f"{name:10} median {median:.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), peak {max(peaks):.0f} MB")
        results[name] = {"median_s": round(median, 3), "peak_mb": round(max(peaks))}
    ratio = statistics.median(theirs[0] / own[0] for own, theirs in pairs)
    print(f"diffusers takes {ratio:.2f} times as long (median of {len(pairs)} pairs)")
    print(json.dumps(results | {"ratio": round(ratio, 3)}))


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
