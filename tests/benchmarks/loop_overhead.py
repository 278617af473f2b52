"""Time one step of the sampling loop without its network, against diffusers' scheduler.step, in turns.

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
        times: list[list[float]] = [[], []]
        for round_ in range(arguments.rounds + 2):  # the first two warm up
            for place, run in enumerate(runs):
                seconds = run()
                if round_ >= 2:
                    times[place].append(seconds / arguments.steps * 1e6)
        medians = [statistics.median(one) for one in times]
        ranges = [f"{min(one):.0f}-{max(one):.0f}" for one in times]
        print(
            f"{sampler:9} {medians[0]:5.0f} us a step ({ranges[0]}), diffusers {medians[1]:5.0f} us ({ranges[1]}):"
            f" {medians[1] / medians[0]:.1f} times as long"
        )
        figures[sampler] = {"ours_us": medians[0], "diffusers_us": medians[1], "ratio": medians[1] / medians[0]}
    print(json.dumps(figures))


def ours(sampler: str, steps: int, output: Tensor, noise: Tensor) -> Callable[[], float]:
    """Return a timed run of our loop whose network gives `output` at once; the plan is made beforehand."""
    plan = make_plan(NoiseSchedule(**VALUES), sampler, steps)
    denoise = as_denoiser(lambda x, call: output, "epsilon")

    def run() -> float:
        begin = time.perf_counter()
        for _ in sample(denoise, plan, start(plan, noise), [image_generator(0)]):
            pass
        return time.perf_counter() - begin

    return run


def diffusers(name: str, steps: int, output: Tensor, noise: Tensor) -> Callable[[], float]:
    """Return the same run by a diffusers scheduler, timed after its timesteps are set."""
    import diffusers as library

    scheduler = getattr(library, name)(**VALUES)

    def run() -> float:
        scheduler.set_timesteps(steps)
        begin = time.perf_counter()
        x = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(x, timestep)
            x = scheduler.step(output, timestep, x).prev_sample
        return time.perf_counter() - begin

    return run


if __name__ == "__main__":
    main()
