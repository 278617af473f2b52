"""Everything that is to be done on a GPU machine, in one call that ends in time: tests, figures, training.

    python tests/on_gpu.py --out out --minutes 8
    python tests/on_gpu.py --out out --part recipe --minutes 5 --set run.steps=3000
    python tests/on_gpu.py --out out --part recipe --minutes 5 --set run.steps=3000  # goes on
    python tests/on_gpu.py --out out --device cpu --minutes 20  # each part in small, to try the script

See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {  # that each part does not run without
    "tests": ("torch", "diffusers", "transformers", "accelerate", "datasets", "pydantic", "safetensors", "pytest"),
    "figures": ("torch", "diffusers", "transformers", "accelerate", "safetensors"),
    "recipe": ("torch", "accelerate", "datasets", "pydantic", "safetensors", "yaml"),
}
SHARES = {"tests": 0.45, "figures": 0.75, "recipe": 1.0}  # of the time, when each part has to have ended
STAGES = ("configs/emoji-autoencoder-gpu.yaml", "configs/emoji-diffusion-gpu.yaml")
DATA, DRAWN = "data/emoji128", ("--size", "128", "--scenes", "30000")  # what they train on, and how it is drawn
# What is measured, most wanted first: arguments, and the most seconds that they may take.
TRAIN, DRAW = "tests/benchmarks/train_throughput.py", "tests/benchmarks/draw_throughput.py"
FIGURES: dict[str, tuple[str, int]] = {
    "embedded, drawing": (f"{DRAW} --batches 1 8 64 --rounds 3", 90),
    "embedded, graphs": (f"{DRAW} --graphs --batches 1 8 64 --rounds 3", 90),
    "embedded, training": (f"{TRAIN} --precision bf16 --batch-size 256 --rounds 5", 90),
    "sd1.5, float16, graphs": (f"{DRAW} --graphs --model sd1.5 --dtype float16 --batches 1 8 --rounds 3", 120),
    "sdxl, float16, graphs": (f"{DRAW} --graphs --model sdxl --dtype float16 --batches 1 8 --rounds 2", 150),
    "sd1.5, float16": (f"{DRAW} --model sd1.5 --dtype float16 --rounds 3", 90),
    "sd2-256, training": (f"{TRAIN} --model sd2-256 --precision bf16 --batch-size 32 --rounds 5", 120),
    "sd1.5, float16, compiled": (f"{DRAW} --model sd1.5 --dtype float16 --compile --rounds 3", 180),
    "sdxl, float16, compiled": (f"{DRAW} --model sdxl --dtype float16 --compile --rounds 2", 240),
    "sd1.5, bfloat16": (f"{DRAW} --model sd1.5 --dtype bfloat16 --rounds 3", 90),
    "sd1.5, bfloat16, compiled": (f"{DRAW} --model sd1.5 --dtype bfloat16 --compile --rounds 3", 180),
    "embedded, bfloat16": (f"{DRAW} --dtype bfloat16 --batches 1 8 64 --rounds 3", 90),
    "embedded, training, float32": (f"{TRAIN} --precision no --batch-size 256 --rounds 5", 90),
}
IN_SMALL: dict[str, tuple[str, int]] = {
    "embedded, drawing": (f"{DRAW} --batches 1 --steps 1 --rounds 1", 300),
    "embedded, training": (f"{TRAIN} --batch-size 1 --rounds 1", 300),
}
PIECE, PIECES = 15 * 2**20, 3  # bytes of a file of weights, and how many there may be
TO_SAVE = 45  # seconds that a training has to end in after it was told to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, figures and weights")
    parser.add_argument("--part", choices=[*PACKAGES, "all"], default="all")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (default 8)")
    parser.add_argument("--recipe", nargs="+", default=list(STAGES), help="configs to train, one after another")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where runs are, and those to go on with")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script in small")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begin, seconds = time.monotonic(), 60 * options.minutes
    summary: dict[str, Any] = {"machine": machine(options.device)}
    parts = list(PACKAGES) if options.part == "all" else [options.part]
    for part in parts:
        share = SHARES[part] if options.part == "all" else 1.0
        missing = [name for name in PACKAGES[part] if importlib.util.find_spec(name) is None]
        print(f"== {part}", flush=True)
        if missing:
            summary[part] = {"skipped": f"not installed: {', '.join(missing)}"}
        else:
            summary[part] = RUN[part](options, begin + share * seconds)
        print(json.dumps(summary[part], indent=1), flush=True)
        summary["seconds"] = round(time.monotonic() - begin)
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


def machine(device: str) -> dict[str, Any]:
    """Return what it runs on: names, memory and versions."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    for package in ("torch", "diffusers", "transformers", "triton", "xformers"):
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found["gpu"] = (
            subprocess.run(asked, capture_output=True, text=True).stdout.strip() if device == "cuda" else None
        )
    except OSError:
        found["gpu"] = "nvidia-smi is not there"
    return found


def call(
    command: Sequence[str], options: argparse.Namespace, log: Path, until: float, end: signal.Signals = signal.SIGKILL
) -> int | None:
    """Run Python with arguments, its output in a log; return the exit status, None where it had to be ended.

    Args:
        until: monotonic second at which it is sent `end`; it is killed `TO_SAVE` later.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LATENTDIFF_TEST_DEVICE": options.device}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    with log.open("a") as file:
        print(f"$ python {' '.join(command)}", file=file, flush=True)
        # In a session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(end)
        with suppress(subprocess.TimeoutExpired):
            process.wait(TO_SAVE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None


@contextmanager
def watched(device: str) -> Iterator[dict[str, Any]]:
    """Give a dictionary that after the block says how busy the GPU was and what memory it used at most."""
    found: dict[str, Any] = {}
    asked = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-l", "1"]
    try:
        process = subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) if device == "cuda" else None
    except OSError:
        process = None
    try:
        yield found
    finally:
        if process is not None:
            process.terminate()
            lines = [line.split(", ") for line in process.communicate()[0].splitlines()]
            rows = [(int(used), int(memory)) for used, memory in lines if used.isdigit()]
            if rows:
                found |= {"busy_percent_median": statistics.median(used for used, _ in rows)}
                found |= {"busy_percent_most": max(used for used, _ in rows), "mb": max(memory for _, memory in rows)}


def run_tests(options: argparse.Namespace, until: float) -> dict[str, Any]:
    """Run the tests of a GPU, in several processes where pytest-xdist is there."""
    log = options.out / "tests.log"
    command = ["-m", "pytest", "-q", "-rs", "--durations=10", "tests/devices/test_real_gpu.py"]
    if options.device == "cpu":
        command += ["-k", "noise or likelihoods"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    status = call(command, options, log, until)
    lines = log.read_text(errors="replace").splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    return {"status": status, "counts": counts[-1] if counts else "did not end", "failed": failed}


def run_figures(options: argparse.Namespace, until: float) -> dict[str, Any]:
    """Measure one after another while there is time; what fails or takes too long costs nothing but itself."""
    found: dict[str, Any] = {}
    log = options.out / "figures.log"
    for name, (command, most) in (FIGURES if options.device == "cuda" else IN_SMALL).items():
        if time.monotonic() > until - 20:
            found[name] = "no time left"
            continue
        log.touch()
        written = log.stat().st_size
        with watched(options.device) as gpu:
            status = call(command.split(), options, log, min(until, time.monotonic() + most))
        lines = log.read_bytes()[written:].decode(errors="replace").splitlines()
        print("\n".join([name, *lines[1:-1]]) if status == 0 else f"{name}: failed, see {log.name}", flush=True)
        figures = json.loads(lines[-1]) if status == 0 else {"status": status, "said": lines[-3:]}
        found[name] = {"gpu": gpu, **figures}
    return found


def run_recipe(options: argparse.Namespace, until: float) -> dict[str, Any]:
    """Train one config after another, each from its newest checkpoint, until they are done or it is time."""
    found: dict[str, Any] = {}
    log, folder = options.out / "recipe.log", options.runs
    if set(options.recipe) & set(STAGES) and not (ROOT / DATA / "train/metadata.jsonl").exists():
        begin = time.monotonic()
        status = call(["-m", "latentdiff", "data", "emoji", DATA, *DRAWN], options, log, until)
        found["data"] = {"status": status, "seconds": round(time.monotonic() - begin)}
    for recipe in options.recipe:
        folder = options.runs / Path(recipe).stem
        if (folder / "model").exists() or (folder / "vae").exists():
            found[recipe] = {"status": "done before"}
            continue
        if time.monotonic() > until - TO_SAVE:
            found[recipe] = {"status": "no time left"}
            break
        command = ["-m", "latentdiff", "train", recipe, "--out", str(folder), "--resume"]
        command += [part for override in options.overrides for part in ("--set", override)]
        begin = time.monotonic()
        with watched(options.device) as gpu:
            status = call(command, options, log, until - TO_SAVE, signal.SIGTERM)
        steps = sorted(path.name for path in folder.glob("checkpoints/step-*"))
        found[recipe] = {"status": "ended in time" if status is None else status, "gpu": gpu}
        found[recipe] |= {"seconds": round(time.monotonic() - begin), "newest": steps[-1] if steps else None}
        if status != 0:
            found[recipe]["said"] = log.read_text(errors="replace").splitlines()[-3:]
            break
    return {**found, "weights": bring(folder, options.out)}


def bring(run: Path, out: Path) -> str:
    """Put the newest pictures of a run, and its model or the average of its newest checkpoint, into a folder."""
    from safetensors.numpy import load_file, save_file

    for picture in sorted(run.glob("samples/*.png"))[-1:]:
        (out / "samples.png").write_bytes(picture.read_bytes())
    files = [path for kind in ("model", "vae") for path in (run / kind).rglob("*") if path.is_file()]
    if not files:
        averages = sorted(run.glob("checkpoints/step-*/ema.safetensors"))
        if not averages:
            return "there are none"
        half = {name: value.astype("float16") for name, value in load_file(averages[-1]).items()}
        save_file(half, run / "ema-half.safetensors")
        files = [run / "ema-half.safetensors", run / "config.yaml"]
    size = sum(path.stat().st_size for path in files)
    if size > PIECE * PIECES:
        return f"{size / 2**20:.0f} MB are too much for {PIECES} files; they are in {run}"
    archive = run / "weights.tar"
    with tarfile.open(archive, "w") as tar:
        for path in files:
            tar.add(path, path.relative_to(run))
    data = archive.read_bytes()
    for number, first in enumerate(range(0, len(data), PIECE)):
        (out / f"weights.tar.{number}").write_bytes(data[first : first + PIECE])
    return f"{len(data) / 2**20:.0f} MB in weights.tar.*"


RUN = {"tests": run_tests, "figures": run_figures, "recipe": run_recipe}

if __name__ == "__main__":
    main()
