"""Compute cost and hours of a Stable Diffusion 1.5 trained from scratch, and of 10^8 pictures, for numbers of GPUs.

    python tests/benchmarks/scale_plan.py
    python tests/benchmarks/scale_plan.py --prices mine.yaml

Prices, throughputs and amounts come from a file that is made to be changed, where each has its source. Two things come
from the code itself: FLOPs, counted in our networks with the shapes of Stable Diffusion 1.5, and, measured on this
machine, what a row costs in naming, manifest and task. Prints tables and a JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.checkpoints.family import FOLDER
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from latentdiff.scale.manifest import Manifest
from latentdiff.scale.plan import Layout, Task, read_shards
from latentdiff.scale.rows import Columns, Maker
from latentdiff.scale.table import Table

PRICES = Path(__file__).with_name("scale_prices.yaml")
FAMILY = "Stable Diffusion 1.x"
TOKENS, WIDTH, FACTOR = 77, 768, 8
BACKWARD = 3  # FLOPs of a training step by those of a call
SAMPLE_ROWS = 20_000
GIGA, TERA = 1e9, 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prices", type=Path, default=PRICES)
    given = yaml.safe_load(parser.parse_args().prices.read_text())
    flops, row = count_flops(), measure_rows(int(given["drawing"]["shard_size"]))
    columns = [f"{count} GPUs" for count in given["gpus"]]
    figures = {
        "training": training(given, flops),
        "drawing": drawing(given, flops),
        "bottlenecks": bottlenecks(given, flops, row),
    }
    for title, table in figures.items():
        print(f"\n{title}\n")
        print_table(table, columns)
    print(json.dumps({"tflops": flops, "row": row, **figures}))


def count_flops() -> dict[str, float]:
    """Return the TFLOPs of one call of each network, for one image."""
    tree = json.loads((FOLDER / "families.json").read_text())[FAMILY]
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_dict(tree["unet"]))
        vae = AutoencoderKL(AutoencoderConfig.from_dict(tree["vae"]))
        text = CLIPTextModel(CLIPTextConfig.from_dict(tree["text"][0]["config"]))
        timestep, context = torch.zeros(1, dtype=torch.int64), torch.zeros(1, TOKENS, WIDTH)
        tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
        counted = {
            "text": _teraflops(partial(text, tokens, torch.ones_like(tokens))),
            "weights": sum(weight.numel() for weight in unet.parameters()) / TERA,
        }
        for side in (256, 512):
            images, latents = torch.zeros(1, 3, side, side), torch.zeros(1, 4, side // FACTOR, side // FACTOR)
            counted[f"unet_{side}"] = _teraflops(partial(unet, latents, timestep, context))
            counted[f"encode_{side}"] = _teraflops(partial(vae.encode, images))
            counted[f"decode_{side}"] = _teraflops(partial(vae.decode, latents))
    return counted


def _teraflops(call: Callable[[], object]) -> float:
    # Fused kernels are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / TERA


class _Numbered(Table):
    """A table of prompts of a usual length, made as they are read."""

    def rows(self) -> Any:
        for number in range(SAMPLE_ROWS):
            yield {"prompt": f"a photograph of a red fox in deep snow, number {number}, early morning", "seed": number}


def measure_rows(shard_size: int) -> dict[str, float]:
    """Return what a row costs on this machine: seconds of naming, bytes of its manifest and of its task; and a PNG."""
    layout = Layout(Maker({"model_hash": "0" * 64}), Columns(), "webdataset", shard_size)
    began = time.process_time()
    shards = list(read_shards(_Numbered("made", "jsonl"), layout))
    seconds = time.process_time() - began
    first, digest = shards[0], "0" * 64
    entries = [
        {"row": row.number, "name": name, "key": name, "bytes": 460_800, "sha256": digest}
        for row, name in zip(first.rows, first.names)
    ]
    data = {f"shards/{first.name}.tar": {"bytes": 118_000_000, "sha256": digest}}
    manifest = Manifest(first.name, "webdataset", data, entries).render()
    noise = np.random.default_rng(0).normal(128, 8, (512, 512, 3)) + np.linspace(-90, 90, 512)[:, None]
    picture, buffer = Image.fromarray(noise.clip(0, 255).astype(np.uint8)), io.BytesIO()
    encoding = time.process_time()
    picture.save(buffer, "PNG")
    return {
        "naming_seconds": seconds / SAMPLE_ROWS,
        "manifest_bytes": len(manifest) / len(first.rows),
        "task_bytes": len(pickle.dumps(Task(first))) / len(first.rows),
        "shard_memory_bytes": sys.getsizeof(first.name) + 2 * 64,  # in the sets of names of a plan
        "png_seconds": time.process_time() - encoding,
        "png_bytes": float(len(buffer.getvalue())),
    }


def training(given: Mapping[str, Any], flops: Mapping[str, float]) -> dict[str, list[str]]:
    """Return hours and cost of each stage, by name, for each number of GPUs."""
    prices, speed, amounts = given["prices"], given["throughput"], given["training"]
    rate, pictures = speed["inference_teraflops"], amounts["pictures"]
    download = pictures / (speed["download_core"] * amounts["cores"]) / 3600
    encode = pictures * (flops["encode_256"] + flops["encode_512"]) / rate / 3600  # hours of one GPU
    bytes_kept = pictures * (amounts["jpeg_kilobytes"] * 1000 + latent_bytes(256) + latent_bytes(512))
    storage = bytes_kept / GIGA * prices["gigabyte_month"] * amounts["months"]
    found: dict[str, list[str]] = {}
    for count in given["gpus"]:
        stages = {
            "latents of 256 and 512 px": encode / count,
            **{
                f"training at {side} px": step_seconds(given, flops, side, count)[0] * steps(amounts, side) / 3600
                for side in (256, 512)
            },
        }
        hours = download + sum(stages.values())
        dollars = {name: each * count * prices["gpu_hour"] for name, each in stages.items()}
        fixed = download * amounts["cores"] * prices["core_hour"]
        line = {"pictures": (download, fixed), **{name: (stages[name], dollars[name]) for name in stages}}
        for name, (each, cost) in line.items():
            found.setdefault(name, []).append(f"{each:,.0f} h, ${cost:,.0f}")
        found.setdefault("storage", []).append(f"{bytes_kept / TERA:,.0f} TB, ${storage:,.0f}")
        total = fixed + storage + sum(dollars.values())
        found.setdefault("all", []).append(f"{hours / 24:,.1f} days, ${total:,.0f}")
    return found


def latent_bytes(side: int) -> int:
    """Return the bytes of the cached latents of a picture, as training stores them."""
    return 4 * (side // FACTOR) ** 2 * 2


def steps(amounts: Mapping[str, Any], side: int) -> float:
    """Return how many steps a stage has."""
    return float(amounts[f"seen_{side}"] / amounts["batch"])


def step_seconds(given: Mapping[str, Any], flops: Mapping[str, float], side: int, count: int) -> tuple[float, float]:
    """Return the seconds of a training step, and those of its computation alone.

    Gradients travel while others are computed, so a step takes the longer of both.
    """
    speed = given["throughput"]
    compute = given["training"]["batch"] / count / speed[f"train_{side}"]
    reduce = 2 * 4 * flops["weights"] * TERA / GIGA / speed["reduce_gigabytes"] * (count - 1) / count
    return max(compute, reduce), compute


def drawing(given: Mapping[str, Any], flops: Mapping[str, float]) -> dict[str, list[str]]:
    """Return hours and cost of a table of pictures, by name, for each number of GPUs."""
    prices, job = given["prices"], given["drawing"]
    each, found = picture_seconds(given, flops), dict[str, list[str]]()
    for count in given["gpus"]:
        hours, kept = job["rows"] * each / count / 3600, job["rows"] * job["png_kilobytes"] * 1000
        gpus = hours * count * prices["gpu_hour"]
        writes = 2 * job["rows"] / job["shard_size"] / 1000 * prices["thousand_writes"]
        storage = kept / GIGA * prices["gigabyte_month"] * job["months"]
        found.setdefault("pictures a second", []).append(f"{count / each:,.0f}")
        found.setdefault("drawing", []).append(f"{hours:,.0f} h, ${gpus:,.0f}")
        found.setdefault("storage", []).append(f"{kept / TERA:,.0f} TB, ${storage:,.0f} and ${writes:,.0f} for writes")
        found.setdefault("all", []).append(f"{hours / 24:,.1f} days, ${gpus + storage + writes:,.0f}")
    return found


def picture_seconds(given: Mapping[str, Any], flops: Mapping[str, float]) -> float:
    """Return the seconds of one GPU at one picture."""
    job = given["drawing"]
    unet = job["steps"] * job["calls"] * flops[f"unet_{job['side']}"]
    return float(
        (unet + job["calls"] * flops["text"] + flops[f"decode_{job['side']}"])
        / given["throughput"]["inference_teraflops"]
    )


def bottlenecks(given: Mapping[str, Any], flops: Mapping[str, float], row: Mapping[str, float]) -> dict[str, list[str]]:
    """Return what is asked of everything but the GPUs, by name, for each number of GPUs."""
    found: dict[str, list[str]] = {}
    for count in given["gpus"]:
        for name, text in (*_of_training(given, flops, count), *_of_drawing(given, flops, row, count)):
            found.setdefault(name, []).append(text)
    return found


def _of_training(given: Mapping[str, Any], flops: Mapping[str, float], count: int) -> Iterator[tuple[str, str]]:
    states = TOKENS * WIDTH * 2
    for side in (256, 512):
        step, compute = step_seconds(given, flops, side, count)
        images, latents = given["training"]["batch"] / step, latent_bytes(side)
        work = BACKWARD * flops[f"unet_{side}"]
        encoding = f"{flops['text'] / work:.1%}; {flops[f'encode_{side}'] / work:.0%}"
        yield f"training, {side} px: GPU time that waits for gradients", f"{1 - compute / step:.0%}"
        yield (
            f"training, {side} px: GB/s read of latents; of text states too",
            f"{images * latents / GIGA:.2f}; {images * (latents + states) / GIGA:.2f}",
        )
        yield f"training, {side} px: GPU time more to encode texts each time; pictures", encoding
    pictures = given["training"]["pictures"]
    kept = [latent_bytes(256), latent_bytes(512), states]
    yield (
        "training: TB of latents, 256 and 512 px; of text states",
        f"{pictures * kept[0] / TERA:.1f}, {pictures * kept[1] / TERA:.1f}; {pictures * kept[2] / TERA:.1f}",
    )


def _of_drawing(
    given: Mapping[str, Any], flops: Mapping[str, float], row: Mapping[str, float], count: int
) -> Iterator[tuple[str, str]]:
    speed, job = given["throughput"], given["drawing"]
    rate, shards = count / picture_seconds(given, flops), job["rows"] / job["shard_size"]
    decode, written = flops[f"decode_{job['side']}"], rate * job["png_kilobytes"] / 1e6
    call = flops[f"unet_{job['side']}"]
    usual, few = job["steps"] * job["calls"] * call, 4 * call
    minutes, seconds = job["rows"] * row["naming_seconds"] / 60, 2 * shards / 1000 * speed["list_seconds"]
    yield (
        "drawing: GPU time of decoding; where a picture takes 4 calls",
        f"{decode / (decode + usual):.0%}; {decode / (decode + few):.0%}",
    )
    yield "drawing: cores that write PNG", f"{rate * row['png_seconds']:,.0f}"
    yield "drawing: GB/s written; of what the store takes", f"{written:.2f}; {written / speed['store_gigabytes']:.0%}"
    yield "drawing: shards written a second", f"{rate / job['shard_size']:.2f}"
    yield "drawing: load of the core that gives out rows", f"{rate * row['naming_seconds']:.1%}"
    yield "drawing: MB/s through Ray", f"{rate * row['task_bytes'] / 1e6:.2f}"
    yield "drawing: shards; GB of manifests", f"{shards:,.0f}; {job['rows'] * row['manifest_bytes'] / GIGA:.0f}"
    yield (
        "drawing, a plan: minutes to name rows; s to list shards; MB of names",
        f"{minutes:.0f}; {seconds:.0f}; {3 * shards * row['shard_memory_bytes'] / 1e6:.0f}",
    )


def print_table(table: Mapping[str, list[str]], columns: list[str]) -> None:
    """Print a table of Markdown; cells that are the same for all numbers of GPUs are said once."""
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in table.items():
        same = len(set(cells)) == 1
        print(f"| {name} | {' | '.join([cells[0]] + ['same'] * (len(cells) - 1) if same else cells)} |")


if __name__ == "__main__":
    main()
