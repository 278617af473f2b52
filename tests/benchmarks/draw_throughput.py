"""Steps and pictures a second of drawing, against diffusers on the same weights, in turns; random weights will do.

Both draw with DDIM and classifier-free guidance. Steps are timed without the decoder, pictures with it. `--compile`
compiles both U-Nets, `--graphs` runs ours as CUDA graphs; neither compiling nor recording is timed.

    python tests/benchmarks/draw_throughput.py --batches 1 8
    python tests/benchmarks/draw_throughput.py --model sd1.5 --dtype float16 --compile
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff import Pipeline
from latentdiff.checkpoints import Components, embedded_model
from latentdiff.checkpoints.family import clip_tokenizer, families
from latentdiff.devices import DTYPES
from latentdiff.diffusion import NoiseSchedule
from latentdiff.engine.recorded import Recorded
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.bert import BertConfig, BertModel
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

FAMILIES = {"sd1.5": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, GUIDANCE = "a red fox", 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["embedded", *FAMILIES], default="embedded")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="pictures at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="side of the pictures in pixels, unless the model's own")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_default_dtype(DTYPES[options.dtype])  # as a large model has no room twice
    pipe = Pipeline(build(options.model))
    torch.set_default_dtype(torch.float32)
    peer = pipe.to_diffusers()
    if options.graphs:
        pipe = Pipeline(pipe.components, engine=Recorded())
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    peer.safety_checker = None
    if options.compile:
        pipe.unet.compile()
        peer.unet.compile()
    figures: dict[str, Any] = {"device": device_name(), "torch": torch.__version__, **vars(options)}
    with torch.no_grad():
        for count in options.batches:
            for output in ("latent", "pil"):
                figures[f"{output} {count}"] = compare(pipe, peer, count, output, options)
    print(json.dumps(figures))


def build(model: str) -> Components:
    """Return a model of random weights on the device, in the shape of a published one or of that of the package."""
    more: dict[str, Any] = {}
    with torch.device(DEVICE):
        if model == "embedded":
            folder = embedded_model()
            configs = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/config.json")}
            text: Any = BertModel(BertConfig.from_dict(configs["text_encoder"]))
            tokenizer: Any = Tokenizer.from_folder(folder / "tokenizer")
            schedule = NoiseSchedule.from_dict(json.loads((folder / "scheduler/scheduler_config.json").read_text()))
        else:
            shape = families()[FAMILIES[model]]
            configs = {"unet": shape["unet"], "vae": shape["vae"]}
            texts = [
                (CLIPTextModel(CLIPTextConfig.from_dict(one["config"])), clip_tokenizer(one["pad"]))
                for one in shape["text"]
            ]
            (text, tokenizer), schedule = texts[0], NoiseSchedule(**shape["schedule"])
            if len(texts) > 1:
                more = {"text_encoder_2": texts[1][0], "tokenizer_2": texts[1][1], "force_zeros": shape["force_zeros"]}
        unet = UNet2DConditionModel(UNetConfig.from_dict(configs["unet"]))
        autoencoder = AutoencoderKL(AutoencoderConfig.from_dict(configs["vae"]))
    for network in (unet, autoencoder, text, more.get("text_encoder_2", text)):
        network.requires_grad_(False).eval()
    return Components(
        unet=unet, autoencoder=autoencoder, text_encoder=text, tokenizer=tokenizer, schedule=schedule, **more
    )


def compare(pipe: Pipeline, peer: Any, count: int, output: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time both in turns; return steps and pictures a second of each, and the most memory in MB that each took."""
    shared = {"num_inference_steps": options.steps, "guidance_scale": GUIDANCE, "output_type": output}
    shared |= {} if options.size is None else {"height": options.size, "width": options.size}
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: pipe(PROMPT, num_images=count, batch_size=count, sampler="ddim", **shared),
        "diffusers": lambda: peer(PROMPT, num_images_per_prompt=count, **shared),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = {name: peak(draw) for name, draw in sides.items()}  # which warms up, and compiles
    for _ in range(options.rounds):
        for name, draw in sides.items():
            times[name].append(seconds(draw))
    found: dict[str, Any] = {}
    for name, measured in times.items():
        middle = statistics.median(measured)
        found[name] = {"steps_per_s": options.steps / middle, "pictures_per_s": count / middle, "peak_mb": peaks[name]}
        print(
            f"{output:6} x {count:3} {name:10} {options.steps / middle:.2f} steps/s, {count / middle:.3f} pictures/s "
            f"({min(measured):.3f} to {max(measured):.3f} s), peak {peaks[name]:.0f} MB",
            flush=True,
        )
    found["ratio"] = statistics.median(theirs / ours for ours, theirs in zip(times["ours"], times["diffusers"]))
    return found


def seconds(draw: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    begin = time.perf_counter()
    draw()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak(draw: Callable[[], Any]) -> float:
    """Return the most memory of the GPU in MB during the second of two calls; 0 on a CPU."""
    draw()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    draw()
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else 0.0


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


if __name__ == "__main__":
    main()
