"""Images a second and peak memory of one diffusion training step, against the same step by diffusers' means, in turns.

Same shape, weights, batch, precision, optimizer (AdamW), clipping and average of the weights. Latents and text states
are cached for both; uncached, both start from pixels and tokens, which frozen encoders of the same weights encode. Ours
runs as `latentdiff train` runs it, theirs as diffusers' text-to-image script does, each in a process of its own.

    python tests/benchmarks/train_throughput.py
    python tests/benchmarks/train_throughput.py --uncached
    python tests/benchmarks/train_throughput.py --model sd2-256 --batch-size 16 --precision bf16 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers import UNet2DConditionModel as TheirUNet
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.training.config import ObjectiveConfig
from latentdiff.training.data.batches import Batch
from latentdiff.training.loop.cpu import tuned_for_cpu
from latentdiff.training.loop.ema import Ema
from latentdiff.training.losses.diffusion import diffusion_losses

from latentdiff.checkpoints import embedded_model, load_autoencoder, load_text_encoder
from latentdiff.diffusion import NoiseSchedule
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.parity.published import UNETS

STEPS = 3  # a round
# Configuration, side of the latents, tokens and width of the text states.
MODELS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "embedded": (json.loads((embedded_model() / "unet" / "config.json").read_text()), 16, 32, 384),
    "sd2-256": (UNETS["stable-diffusion-2.1"], 32, 77, 1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="embedded")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--uncached", action="store_true", help="encode pictures and text in each step (embedded only)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", choices=list(STEPS_OF), help="be one of both, which waits for its turns")
    options = parser.parse_args()
    if options.uncached and options.model != "embedded":
        parser.error("--uncached is for --model embedded, whose encoders are at hand")
    if options.side is not None:
        take_turns(options)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--side"]
    sides = {name: subprocess.Popen([*command, name], **PIPES) for name in STEPS_OF}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):  # the first warms up
        for name, side in sides.items():
            seconds = float(ask(side, "go"))
            if number:
                times[name].append(seconds)
    figures: dict[str, Any] = {"device": device(), "threads": torch.get_num_threads(), **vars(options)}
    flops = count_flops(options)
    for name, measured in times.items():
        middle, memory = statistics.median(measured), float(ask(sides[name], "end"))
        rate = options.batch_size / middle
        print(
            f"{name:10} {rate:.1f} images/s ({middle * 1e3:.0f} ms a step, {min(measured) * 1e3:.0f} to "
            f"{max(measured) * 1e3:.0f}), {flops / middle / 1e12:.3f} TFLOP/s, peak {memory:.0f} MB"
        )
        figures[name] = {"images_per_s": rate, "ms": middle * 1e3, "peak_mb": memory, "tflops": flops / middle / 1e12}
    pairs = [theirs / ours for ours, theirs in zip(times["ours"], times["diffusers"])]
    figures["ratio"] = statistics.median(pairs)
    print(f"ours does {figures['ratio']:.2f} times the images of diffusers ({min(pairs):.2f} to {max(pairs):.2f})")
    print(json.dumps(figures))


def ask(side: subprocess.Popen[str], question: str) -> str:
    """Return a side's answer."""
    assert side.stdin is not None and side.stdout is not None
    print(question, file=side.stdin, flush=True)
    return side.stdout.readline()


def take_turns(options: argparse.Namespace) -> None:
    """Run `STEPS` steps at each "go" and print the seconds of one, and at "end" the most memory in MB that they took.

    Memory is that of the GPU, or of the process beyond what it has before.
    """
    torch.zeros(1, device=device())
    if device() == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before, steps = high_water(), STEPS_OF[options.side](options)
    for line in sys.stdin:
        if line.startswith("end"):
            break
        begin = time.perf_counter()
        for _ in range(STEPS):
            next(steps)
        synchronize()
        print((time.perf_counter() - begin) / STEPS, flush=True)
    on_gpu = torch.cuda.is_available()
    print(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else high_water() - before)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def high_water() -> float:
    """Return the most memory of the process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def batch_of(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return latents (B, 4, h, w) and context (B, L, D); uncached, images (B, 3, H, W) and tokens (B, L)."""
    _, side, length, width = MODELS[options.model]
    torch.manual_seed(0)
    if options.uncached:
        images = torch.rand(options.batch_size, 3, 4 * side, 4 * side, device=device()) * 2 - 1
        return images, torch.randint(1000, 30000, (options.batch_size, length), device=device())
    latents = torch.randn(options.batch_size, 4, side, side, device=device())
    return latents, torch.randn(options.batch_size, length, width, device=device())


def autocast(options: argparse.Namespace) -> Any:
    return torch.autocast(device(), torch.bfloat16) if options.precision == "bf16" else nullcontext()


def our_unet(options: argparse.Namespace) -> UNet2DConditionModel:
    torch.manual_seed(0)
    with torch.device(device()):
        return UNet2DConditionModel(UNetConfig.from_dict(MODELS[options.model][0])).train()


def our_encoders(options: argparse.Namespace) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return what makes latents and context of a batch; what is cached stays as it is."""
    if not options.uncached:
        return lambda latents, context: (latents, context)
    autoencoder = load_autoencoder(embedded_model()).to(device())
    text_encoder = load_text_encoder(embedded_model())[0].to(device())

    @torch.no_grad()
    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        latents = autoencoder.encode(images).mode() * autoencoder.config.scaling_factor
        return latents.float(), text_encoder(tokens).last_hidden_state

    return encode


def their_encoders(options: argparse.Namespace) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the same by diffusers' autoencoder and transformers' text encoder."""
    if not options.uncached:
        return lambda latents, context: (latents, context)
    folder, dtype = embedded_model(), torch.bfloat16 if options.precision == "bf16" else torch.float32
    autoencoder: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype).to(device())
    text_encoder: Any = BertModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(device())
    for network in (autoencoder, text_encoder):
        network.requires_grad_(False)

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        latents = autoencoder.encode(images.to(dtype)).latent_dist.mode() * autoencoder.config.scaling_factor
        return latents, text_encoder(tokens, return_dict=False)[0]

    return encode


def ours(options: argparse.Namespace) -> Iterator[None]:
    """Train by ours, a step at a time."""
    unet, batch, encode = our_unet(options), batch_of(options), our_encoders(options)
    schedule = NoiseSchedule(beta_schedule="scaled_linear", prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    ema = Ema(unet, 0.999)
    components: Any = SimpleNamespace(schedule=schedule)
    objective = ObjectiveConfig(min_snr_gamma=0.0)
    dropped = torch.zeros(options.batch_size, dtype=torch.bool)
    with tuned_for_cpu(unet):
        while True:
            optimizer.zero_grad()
            with autocast(options):
                latents, context = encode(*batch)
                timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
                noise = torch.randn_like(latents)
                loss = diffusion_losses(
                    unet, components, objective, Batch(latents, context, dropped), timesteps, noise
                ).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            ema.update(unet)
            yield


def theirs(options: argparse.Namespace) -> Iterator[None]:
    """Do the same by diffusers' U-Net, scheduler and average."""
    batch, encode = batch_of(options), their_encoders(options)
    with torch.device(device()):
        unet: Any = TheirUNet.from_config(MODELS[options.model][0]).train()
    unet.load_state_dict(our_unet(options).state_dict())
    schedule: Any = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    ema = EMAModel(unet.parameters(), decay=0.999, foreach=True)
    while True:
        latents, context = encode(*batch)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noise = torch.randn_like(latents)
        noisy = schedule.add_noise(latents, noise, timesteps)
        target = schedule.get_velocity(latents, noise, timesteps)
        with autocast(options):
            output = unet(noisy, timesteps, context, return_dict=False)[0]
            loss = F.mse_loss(output.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        yield


PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
STEPS_OF: dict[str, Callable[[argparse.Namespace], Iterator[None]]] = {"ours": ours, "diffusers": theirs}


def count_flops(options: argparse.Namespace) -> float:
    """Return the floating-point operations of a step: those of the U-Net's forward pass three times."""
    unet, (latents, context) = our_unet(options), our_encoders(options)(*batch_of(options))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(latents[:1], torch.zeros(1, device=latents.device), context[:1])
    return 3.0 * counter.get_total_flops() * options.batch_size


if __name__ == "__main__":
    main()
