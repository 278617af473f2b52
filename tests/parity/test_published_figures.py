"""The figures in diffusers' own tests of its schedulers (commit 58eb52c), from our tables.

Their tests step from numbers in a row with a network that multiplies; the figure is the sum or the mean of the
magnitudes of the result. Left out are DPM-Solver++ SDE, whose noise is that of a Brownian tree; LMS after noise, where
diffusers weighs one slope as if it had four; and PNDM of velocities, which diffusers extrapolates where the paper (and
ours) extrapolates noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.diffusion import SAMPLERS, NoiseSchedule, make_plan

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
LARGE = {**LINEAR, "num_train_timesteps": 1100}
SIGMA_MIN = {**LINEAR, "final_sigmas_type": "sigma_min"}
V = {"prediction_type": "v_prediction"}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}
DDIM, DDPM, DEIS = ((name, LINEAR) for name in ("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler"))
MULTI, SINGLE, UNIPC = (
    (f"{name}Scheduler", SIGMA_MIN) for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")
)
EULER, EULER_A, HEUN, LMS, DPM2, DPM2_A = (
    (f"{name}DiscreteScheduler", LARGE)
    for name in ("Euler", "EulerAncestral", "Heun", "LMS", "KDPM2", "KDPM2Ancestral")
)
PNDM, LCM = ("PNDMScheduler", LINEAR), ("LCMScheduler", {})

# sampler, (class, config), changes of the config, steps, steps left out before noise is added, sum, mean
FIGURES: list[tuple[str, tuple[str, dict[str, Any]], dict[str, Any], int, int, float | None, float | None]] = [
    ("ddpm", DDPM, {}, 1000, 0, 258.9606, 0.3372),
    ("ddpm", DDPM, V, 1000, 0, 202.0296, 0.2631),
    ("ddpm", DDPM, {}, 1000, 998, 387.9466, 0.5051),
    ("ddim", DDIM, {}, 10, 0, 172.0067, 0.223967),
    ("ddim", DDIM, V, 10, 0, 52.5302, 0.0684),
    ("ddim", DDIM, {"beta_start": 0.01, "set_alpha_to_one": True}, 10, 0, 149.8295, 0.1951),
    ("ddim", DDIM, {"beta_start": 0.01, "set_alpha_to_one": False}, 10, 0, 149.0784, 0.1941),
    ("ddim", DDIM, {}, 10, 8, 354.5418, 0.4616),
    ("euler", EULER, {}, 10, 0, 10.0807, 0.0131),
    ("euler", EULER, V, 10, 0, 0.0002, None),
    ("euler", EULER, {}, 10, 8, 57062.9297, 74.3007),
    ("euler_karras", EULER, {}, 10, 0, 124.52299, 0.162139),
    ("euler_a", EULER_A, {}, 10, 0, 152.3192, 0.1983),
    ("euler_a", EULER_A, V, 10, 0, 108.4439, 0.1412),
    ("euler_a", EULER_A, {}, 10, 8, 56163.0508, 73.1290),
    ("heun", HEUN, {}, 10, 0, 0.1233, 0.0002),
    ("heun", HEUN, V, 10, 0, 0.0, None),
    ("heun", HEUN, {}, 10, 8, 75074.8906, None),
    ("heun_karras", HEUN, {}, 10, 0, 0.00015, None),
    ("dpm2", DPM2, {}, 10, 0, 20.4125, 0.0266),
    ("dpm2", DPM2, V, 10, 0, 0.0, None),
    ("dpm2", DPM2, {}, 10, 8, 70408.4062, 91.6776),
    ("dpm2_a", DPM2_A, {}, 10, 0, 13979.9433, 18.2030),
    ("dpm2_a", DPM2_A, V, 10, 0, 331.8133, 0.4320),
    ("dpm2_a", DPM2_A, {}, 10, 8, 93087.3437, 121.2074),
    ("lms", LMS, {}, 10, 0, 1006.388, 1.31),
    ("lms", LMS, V, 10, 0, 0.0017, None),
    ("lms_karras", LMS, {}, 10, 0, 3812.9927, 4.9648),
    ("dpmpp_2m", MULTI, {}, 10, 0, None, 0.3301),
    ("dpmpp_2m", MULTI, {}, 10, 5, 318.4111, None),
    ("dpmpp_2m", MULTI, THRESHOLD, 10, 0, None, 1.1364),
    ("dpmpp_2m", MULTI, V, 10, 0, None, 0.2251),
    ("dpmpp_2m_karras", MULTI, V, 10, 0, None, 0.2096),
    ("dpmpp_2m_exponential", MULTI, V, 10, 0, None, 0.1554),  # there: use_lu_lambdas
    ("dpmpp_2s", SINGLE, {}, 10, 0, None, 0.2791),
    ("dpmpp_2s", SINGLE, V, 10, 0, None, 0.1453),
    ("dpmpp_2s", SINGLE, {}, 10, 5, 269.2187, 0.3505),
    ("dpmpp_2s_karras", SINGLE, {}, 10, 0, None, 0.2248),
    ("dpmpp_2s_karras", SINGLE, V, 10, 0, None, 0.0649),
    ("unipc", UNIPC, {}, 10, 0, None, 0.2464),
    ("unipc", UNIPC, V, 10, 0, None, 0.1014),
    ("unipc", UNIPC, {}, 10, 8, 315.5757, None),
    ("unipc_karras", UNIPC, {}, 10, 0, None, 0.2925),
    ("unipc_karras", UNIPC, V, 10, 0, None, 0.1966),
    ("deis", DEIS, {}, 10, 0, None, 0.23916),
    ("deis", DEIS, V, 10, 0, None, 0.091),
    ("deis", DEIS, {}, 10, 8, 315.3016, None),
    ("pndm", PNDM, {}, 10, 0, 198.1318, 0.2580),
    ("pndm", PNDM, {"beta_start": 0.01, "set_alpha_to_one": True}, 10, 0, 230.0399, 0.2995),
    ("pndm", PNDM, {"beta_start": 0.01, "set_alpha_to_one": False}, 10, 0, 186.9482, 0.2434),
    ("lcm", LCM, {}, 1, 0, 18.7097, 0.0244),
    ("lcm", LCM, {}, 10, 0, 197.7616, 0.2575),
]


def numbers_in_a_row(reverse: bool = False) -> np.ndarray:
    """Rising (or falling) numbers from 0 to 1, batch last, as (4, 3, 8, 8)."""
    row = np.arange(768, dtype=np.float64)
    return (row[::-1] if reverse else row).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) / 768


def run(
    sampler: str, schedule: NoiseSchedule, steps: int, skipped: int, bounded: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Apply a table as their tests step: schedulers in sigma coordinates are given the scaled x to step from."""
    in_sigma = SAMPLERS[sampler.removesuffix("_karras").removesuffix("_exponential")].rule in ("euler", "heun")
    plan = make_plan(schedule, sampler, steps, strength=(steps - skipped) / steps)
    first, generator = float(plan.sigmas[0]), torch.Generator().manual_seed(0)
    whole = make_plan(schedule, sampler, steps)
    x = numbers_in_a_row() * (whole.init_noise_sigma if in_sigma else 1)
    x = x + first * numbers_in_a_row(reverse=True) if skipped else x * (1 if in_sigma else math.hypot(1, first))
    slots = np.stack([x] + [np.zeros_like(x)] * (plan.noise.shape[1] - 1))
    rows = zip(*(table.numpy() for table in (plan.sigmas, plan.timesteps, plan.matrices, plan.noise)))
    for sigma, timestep, matrix, noise in rows:
        seen = slots[0] / math.hypot(1, sigma)
        slots[0] = seen if in_sigma else slots[0]
        output = seen * timestep / (timestep + 1)
        if schedule.prediction_type == "epsilon":
            estimate = slots[0] - sigma * output
        else:
            estimate = slots[0] / (1 + sigma**2) - sigma / math.hypot(1, sigma) * output
        slots = np.tensordot(matrix, np.concatenate([slots, bounded(estimate)[None]]), 1)
        if noise.any():
            drawn = torch.randn(x.shape, generator=generator).double().numpy()
            slots += noise.reshape(-1, 1, 1, 1, 1) * drawn
    return slots[0]


@pytest.mark.parametrize(("sampler", "peer", "changes", "steps", "skipped", "total", "mean"), FIGURES)
def test_published_figure(
    sampler: str,
    peer: tuple[str, dict[str, Any]],
    changes: dict[str, Any],
    steps: int,
    skipped: int,
    total: float | None,
    mean: float | None,
) -> None:
    name, config = peer
    schedule = NoiseSchedule.from_dict({"_class_name": name, **config, **changes})
    threshold = schedule.thresholding

    def bounded(estimate: np.ndarray) -> np.ndarray:
        if sampler == "ddpm":  # whose test clips
            return np.clip(estimate, -1, 1)
        return estimate if threshold is None else threshold(torch.from_numpy(estimate)).numpy()

    found = np.abs(run(sampler, schedule, steps, skipped, bounded))
    if total is not None:
        # Within what they allow, or what float32, in which they count, leaves of the larger ones.
        assert found.sum() == pytest.approx(total, rel=6e-5, abs=1e-2)
    if mean is not None:
        assert found.mean() == pytest.approx(mean, rel=6e-5, abs=1e-3)
