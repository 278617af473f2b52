"""Time and memory of loading a model of the size of Stable Diffusion 1.5, random weights: ours against diffusers.

    python tests/benchmarks/load_models.py
    python tests/benchmarks/load_models.py --runs 5 --only "fp16 -> float16"

Each load is a process of its own, A B A B after a first pair that warms the disk cache. Imports are timed apart. Ours
reads every weight, to check that it is finite; diffusers maps files that are in the right precision, and reads them
when they are used. So there are two times: until the model is returned, and until every weight was read once more (its
largest value taken). Peak memory is the highest resident set above that before the load, until all was read, over the
size of the loaded weights; pages of mapped files count. Prints medians, ranges, the median ratio of the pairs, and a
JSON line. Needs 13 GB of disk.
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
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

MODEL = "stable-diffusion-1.5"
CASES = [
    (layout, stored, loaded)
    for layout in ("folder", "single file")
    for stored, loaded in (("fp16", "float16"), ("fp32", "float32"), ("fp16", "float32"), ("fp32", "float16"))
]
LIBRARIES = ("latentdiff", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="pairs of loads of each case")
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--model", help="where the files are, or are made and kept")
    parser.add_argument("--load", nargs=4, help=argparse.SUPPRESS)  # what a process of its own does
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(*arguments.load)))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {MODEL}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(arguments.model or folder)
        if not (place / "fp32.safetensors").exists():
            write(place)
        results = {}
        for layout, stored, loaded in CASES:
            name = f"{layout}, {stored} -> {loaded}"
            if arguments.only in name:
                results[name] = compare(name, place, (layout, stored, loaded), arguments.runs)
    print(json.dumps(results))


def write(place: Path) -> None:
    """Write the model in both layouts and both precisions."""
    from latentdiff.checkpoints import Components, save_pipeline, single_file
    from latentdiff.diffusion import NoiseSchedule
    from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
    from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
    from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
    from tests.parity.published import AUTOENCODERS, CLIPS, UNETS

    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_dict(UNETS[MODEL]))
        vae = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODERS[MODEL]))
        text = CLIPTextModel(CLIPTextConfig.from_dict(CLIPS[MODEL]))
    for network in (unet, vae, text):
        network.to_empty(device="cpu")
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.02)
    schedule = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    components = Components(
        unet=unet,
        autoencoder=vae,
        text_encoder=text,
        tokenizer=single_file._tokenizer("<|endoftext|>"),
        schedule=schedule,
    )
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        save_pipeline(components, place / name, dtype)
        single_file.save_single_file(components, place / f"{name}.safetensors", dtype)


def compare(name: str, place: Path, case: tuple[str, str, str], runs: int) -> dict[str, Any]:
    """Run pairs of loads and return the figures of both libraries."""
    pairs = [[run(library, place, case) for library in LIBRARIES] for _ in range(runs + 1)][1:]
    result: dict[str, Any] = {}
    for index, library in enumerate(LIBRARIES):
        own = [pair[index] for pair in pairs]
        seconds = [figures["ready_s"] for figures in own]
        result[library] = {key: round(statistics.median(figures[key] for figures in own), 3) for key in own[0]}
        print(
            f"{name:32} {library:10} returned in {result[library]['load_s']:6.2f} s, "
            f"all read in {result[library]['ready_s']:6.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), "
            f"peak {result[library]['peak_mb']:5.0f} MB = {result[library]['peak_ratio']:.2f} x weights, "
            f"imports {result[library]['import_s']:.1f} s",
            flush=True,
        )
    for key in ("load_s", "ready_s"):
        result[f"{key}_ratio"] = round(statistics.median(theirs[key] / ours[key] for ours, theirs in pairs), 2)
    ratios = f"{result['load_s_ratio']} times as long to return, {result['ready_s_ratio']} until all is read"
    print(f"{'':32} diffusers takes {ratios} (median of {runs} pairs)", flush=True)
    return result


def run(library: str, place: Path, case: tuple[str, str, str]) -> dict[str, float]:
    """Load in a process of its own and return its figures."""
    command = [sys.executable, __file__, "--load", library, str(place), *case[:1], f"{case[1]} {case[2]}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def load(library: str, place: str, layout: str, precisions: str) -> dict[str, float]:
    """Load a model once and return seconds and megabytes."""
    stored, name = precisions.split()
    path = f"{place}/{stored}" + (".safetensors" if layout == "single file" else "")
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    if library == "latentdiff":
        from latentdiff.checkpoints import load_pipeline, single_file  # noqa: F401  imported late otherwise
    else:
        from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    imported = time.perf_counter() - start
    dtype = getattr(torch, name)
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the highest resident set starts anew
    start = time.perf_counter()
    if library == "latentdiff":
        components = load_pipeline(path, dtype)
        networks: list[Any] = [components.unet, components.autoencoder, components.text_encoder]
    else:
        options: dict[str, Any] = {"torch_dtype": dtype, "safety_checker": None, "local_files_only": True}
        if layout == "single file":
            pipe = StableDiffusionPipeline.from_single_file(path, config=f"{place}/{stored}", **options)
        else:
            pipe = StableDiffusionPipeline.from_pretrained(path, **options)
        networks = [pipe.unet, pipe.vae, pipe.text_encoder]
    returned = time.perf_counter() - start
    weights = [tensor for network in networks for tensor in network.parameters()]
    for tensor in weights:
        tensor.detach().max()
    ready = time.perf_counter() - start
    above = memory("VmHWM") - before
    assert all(tensor.dtype == dtype for tensor in weights)
    size = sum(tensor.nbytes for tensor in weights) / 1e6
    return {"import_s": imported, "load_s": returned, "ready_s": ready, "peak_mb": above, "peak_ratio": above / size}


def memory(name: str) -> float:
    """Return an entry of the memory of this process in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


if __name__ == "__main__":
    main()
