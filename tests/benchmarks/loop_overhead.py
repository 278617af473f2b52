"""Time one step of the sampling loop without its network, against diffusers' scheduler.step, in turns.

What happens before and in the first step (tables here, timesteps there) is timed apart.

python tests/benchmarks/loop_overhead.py
python tests/benchmarks/loop_overhead.py --steps 50 --rounds 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion import NoiseSchedule, as_denoiser, image_generator, make_plan, sample, start

SHAPE = (1, 4, 64, 64)
VALUES = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}
PEERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    output, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    figures: dict[str, Any] = {"device": "cpu", "dtype": "float32", "shape": SHAPE, "threads": torch.get_num_threads()}
    for sampler, peer in PEERS.items():
        runs = [ours(sampler, arguments.steps, output, noise), diffusers(peer, arguments.steps, output, noise)]
        times: list[list[tuple[float, float]]] = [[], []]
        for round_ in range(arguments.rounds + 2):  # the first two warm up
            for place, run in enumerate(runs):
                prepared, stepped = run()
                if round_ >= 2:
                    times[place].append((prepared * 1e6, stepped / (arguments.steps - 1) * 1e6))
        (prepare, step), (their_prepare, their_step) = (
            [statistics.median(one) for one in zip(*measured)] for measured in times
        )
        low, high = ([extreme(one[1] for one in measured) for measured in times] for extreme in (min, max))
        print(
            f"{sampler:9} {step:5.0f} us a step ({low[0]:.0f}-{high[0]:.0f}), diffusers {their_step:5.0f} us"
            f" ({low[1]:.0f}-{high[1]:.0f}): {their_step / step:.1f} times as long;"
            f" before that {prepare:.0f} us and {their_prepare:.0f} us"
        )
        figures[sampler] = {
            "ours_us": step,
            "diffusers_us": their_step,
            "ratio": their_step / step,
            "ours_before_us": prepare,
            "diffusers_before_us": their_prepare,
        }
    print(json.dumps(figures))


def ours(sampler: str, steps: int, output: Tensor, noise: Tensor) -> Callable[[], tuple[float, float]]:
    """Return a run of our loop whose network gives `output` at once: seconds through the first step, and after it."""
    schedule = NoiseSchedule(**VALUES)
    denoise = as_denoiser(lambda x, call: output, "epsilon")

    def run() -> tuple[float, float]:
        begin = time.perf_counter()
        plan = make_plan(schedule, sampler, steps)
        loop = sample(denoise, plan, start(plan, noise), [image_generator(0)])
        next(loop)
        middle = time.perf_counter()
        for _ in loop:
            pass
        return middle - begin, time.perf_counter() - middle

    return run


def diffusers(name: str, steps: int, output: Tensor, noise: Tensor) -> Callable[[], tuple[float, float]]:
    """Return the same run by a diffusers scheduler."""
    import diffusers as library

    scheduler = getattr(library, name)(**VALUES)

    def run() -> tuple[float, float]:
        begin, middle = time.perf_counter(), 0.0
        scheduler.set_timesteps(steps)
        x = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(x, timestep)
            x = scheduler.step(output, timestep, x).prev_sample
            middle = middle or time.perf_counter()
        return middle - begin, time.perf_counter() - middle

    return run


if __name__ == "__main__":
    main()
