"""Images a second and peak memory of one diffusion training step, against the same step by diffusers' means, in turns.

Same shape, weights, batch, precision, optimizer (AdamW), clipping and average of the weights; latents and text states
cached for both. Ours runs as `latentdiff train` runs it, theirs as diffusers' text-to-image script does.

    python tests/benchmarks/train_throughput.py
    python tests/benchmarks/train_throughput.py --model sd2-256 --batch-size 16 --precision bf16 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.checkpoints import embedded_model
from latentdiff.diffusion import NoiseSchedule
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.parity.published import UNETS
from training.batches import Batch
from training.ema import Ema
from training.objective import diffusion_losses
from training.run import fast_attention

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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", choices=list(STEP_OF), help="run a few steps of one and print its peak memory")
    options = parser.parse_args()
    if options.peak_of is not None:
        print(peak(options))
        return
    steps = {name: make(options) for name, make in STEP_OF.items()}
    flops = count_flops(options)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):  # the first warms up
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(STEPS):
                step()
            synchronize()
            if number:
                times[name].append((time.perf_counter() - begin) / STEPS)
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of"]
    figures: dict[str, Any] = {"device": device(), "threads": torch.get_num_threads(), **vars(options)}
    for name, measured in times.items():
        middle = statistics.median(measured)
        memory = float(subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout)
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


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(options: argparse.Namespace) -> float:
    """Return the most memory in MB that three steps take: of the GPU, or of the process beyond what it has before."""
    torch.zeros(1, device=device())
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = high_water()
    step = STEP_OF[options.peak_of](options)
    for _ in range(3):
        step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return high_water() - before


def high_water() -> float:
    """Return the most memory of the process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def batch_of(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents (B, 4, h, w) and context (B, L, D)."""
    _, side, length, width = MODELS[options.model]
    torch.manual_seed(0)
    latents = torch.randn(options.batch_size, 4, side, side, device=device())
    return latents, torch.randn(options.batch_size, length, width, device=device())


def autocast(options: argparse.Namespace) -> Any:
    return torch.autocast(device(), torch.bfloat16) if options.precision == "bf16" else nullcontext()


def our_unet(options: argparse.Namespace) -> UNet2DConditionModel:
    torch.manual_seed(0)
    with torch.device(device()):
        return UNet2DConditionModel(UNetConfig.from_dict(MODELS[options.model][0])).train()


def ours(options: argparse.Namespace) -> Callable[[], None]:
    """Return a training step of ours."""
    unet, (latents, context) = our_unet(options), batch_of(options)
    schedule = NoiseSchedule(beta_schedule="scaled_linear", prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    ema = Ema(unet, 0.999)
    parts: Any = SimpleNamespace(schedule=schedule)
    batch = Batch(latents, context, torch.zeros(len(latents), dtype=torch.bool))
    config: Any = SimpleNamespace(self_conditioning=False, loss="simple", weighting="min_snr", min_snr_gamma=0.0)

    def step() -> None:
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        with fast_attention():
            with autocast(options):
                noise = torch.randn_like(latents)
                loss = diffusion_losses(unet, parts, config, batch, timesteps, noise).mean()
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.update(unet)

    return step


def theirs(options: argparse.Namespace) -> Callable[[], None]:
    """Return the same step by diffusers' U-Net, scheduler and average."""
    import diffusers
    from diffusers.training_utils import EMAModel

    latents, context = batch_of(options)
    with torch.device(device()):
        unet: Any = diffusers.UNet2DConditionModel.from_config(MODELS[options.model][0]).train()
    unet.load_state_dict(our_unet(options).state_dict())
    schedule: Any = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    ema = EMAModel(unet.parameters(), decay=0.999, foreach=True)

    def step() -> None:
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

    return step


STEP_OF: dict[str, Callable[[argparse.Namespace], Callable[[], None]]] = {"ours": ours, "diffusers": theirs}


def count_flops(options: argparse.Namespace) -> float:
    """Return the floating-point operations of a step: those of the forward pass three times."""
    unet, (latents, context) = our_unet(options), batch_of(options)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), fast_attention():
        unet(latents[:1], torch.zeros(1, device=latents.device), context[:1])
    return 3.0 * counter.get_total_flops() * options.batch_size


if __name__ == "__main__":
    main()
