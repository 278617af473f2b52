"""Every sampler as a short function from falling noise levels to a table of numbers.

A solver is written as its paper writes it, but x, the x0 estimate and the memory are unit vectors (`Rows.state`), so
that each result is the list of its coefficients: one row of the table (`table.py`) that `loop.sample` applies.

In sigma coordinates, x = x0 + sigma noise, the probability-flow ODE is dx/dsigma = (x - D) / sigma, with the estimate
D = denoise(x, sigma). In the DPM-Solver papers lambda is -log(sigma), so a step to sigma' has exp(-h) = sigma' / sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from latentdiff.diffusion.linear_multistep import deis, lms, plms, pndm
from latentdiff.diffusion.table import Rows, Table, steps

__all__ = ["SAMPLERS", "Sampler"]


def ddim(sigmas: Tensor, eta: float = 0.0) -> Table:
    """DDIM in sigma coordinates: eta 0 is Euler's method, eta 1 ancestral sampling.

    Args:
        sigmas: (N + 1,) float64, falling.
        eta: 0 to 1.

    Source: Song et al. 2021, arXiv 2010.02502, Eq. 12 divided by the next signal rate, and Eq. 16.
    """
    rows = Rows(1)
    for sigma, following in steps(sigmas):
        x, D = rows.state
        down, up = _ancestral(sigma, following, eta)
        rows.add(sigma, D + down / sigma * (x - D), noise=up)
    return rows.table()


def ddpm(sigmas: Tensor, variance: str = "fixed_small") -> Table:
    """Ancestral sampling: the mean of the posterior, then noise.

    Args:
        sigmas: (N + 1,) float64, falling.
        variance: "fixed_small", that of the posterior; "fixed_large", beta; or "learned_range", between the two.

    Source: Ho et al. 2020, arXiv 2006.11239, Eq. 6 and 7, section 3.2; Nichol & Dhariwal 2021, arXiv 2102.09672,
    Eq. 15.
    """
    rows = Rows(1)
    for sigma, following in steps(sigmas):
        x, D = rows.state
        down, up = _ancestral(sigma, following)
        # beta = 1 - (1 + following^2) / (1 + sigma^2), divided by the next signal rate
        large = math.sqrt((sigma**2 - following**2) * (1 + following**2) / (1 + sigma**2)) if up > 0 else 0.0
        span = math.log(large / up) if up > 0 and variance == "learned_range" else 0.0
        mean = D + down / sigma * (x - D)
        rows.add(sigma, mean, noise=large if variance == "fixed_large" else up, noise_range=span)
    return rows.table()


def euler(sigmas: Tensor) -> Table:
    """Euler's method. Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1, first-order step on Eq. 3."""
    return ddim(sigmas, eta=0.0)


def euler_a(sigmas: Tensor) -> Table:
    """Euler's method to sigma_down, then fresh noise. Source: Song et al. 2021, arXiv 2010.02502, Eq. 16 at eta 1."""
    return ddim(sigmas, eta=1.0)


def heun(sigmas: Tensor) -> Table:
    """Heun's method, two calls a step: the slope is the mean of those at both ends; Euler into sigma 0.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
    """
    rows = Rows(2)
    for sigma, following in steps(sigmas):
        x, _, D = rows.state
        slope, step = (x - D) / sigma, following - sigma
        rows.add(sigma, x + step * slope, x + step / 2 * slope)
        if following > 0:
            x, halfway, D = rows.state
            rows.add(following, halfway + step / 2 * (x - D) / following)
    return rows.table()


def dpm2(sigmas: Tensor, eta: float = 0.0) -> Table:
    """DPM-Solver-2, two calls a step: the slope is that at the geometric mean of both ends; Euler into sigma 0.

    Args:
        sigmas: (N + 1,) float64, falling.
        eta: how much of the noise is fresh, 0 to 1.

    Source: Lu et al. 2022, arXiv 2206.00927, algorithm 1 with r_1 = 1/2, the slopes taken as in Karras et al. 2022,
    arXiv 2206.00364, Eq. 3.
    """
    rows = Rows(2)
    for sigma, following in steps(sigmas):
        x, _, D = rows.state
        down, up = _ancestral(sigma, following, eta)
        middle = math.sqrt(sigma * down)
        rows.add(sigma, x + (middle - sigma) * (x - D) / sigma, x)
        if middle > 0:
            x, start, D = rows.state
            rows.add(middle, start + (down - sigma) * (x - D) / middle, noise=up, between=True)
    return rows.table()


def dpm2_a(sigmas: Tensor) -> Table:
    """`dpm2` to sigma_down, then fresh noise."""
    return dpm2(sigmas, eta=1.0)


def dpmpp_2s_a(sigmas: Tensor) -> Table:
    """DPM-Solver++(2S) to sigma_down, two calls a step, then fresh noise; Euler into sigma 0.

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 1 with r = 1/2.
    """
    rows = Rows(2)
    for sigma, following in steps(sigmas):
        x, _, D = rows.state
        down, up = _ancestral(sigma, following)
        middle = math.sqrt(sigma * down)
        rows.add(sigma, D + middle / sigma * (x - D), x)
        if middle > 0:
            _, start, D = rows.state
            rows.add(middle, D + down / sigma * (start - D), noise=up, between=True)
    return rows.table()


def dpmpp_2s(sigmas: Tensor, skipped: int = 0) -> Table:
    """DPM-Solver++(2S) with one call a step: of each two steps the second starts again where the first did.

    The step into sigma 0 is of order 1.

    Args:
        sigmas: (N + 1,) float64, falling.
        skipped: steps of the whole run that come before these; pairs are counted from its start.

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 1 with the middle on a level of the run.
    """
    rows, past = Rows(3), 0.0
    for index, (sigma, following) in enumerate(steps(sigmas), start=skipped):
        x, start, first, D = rows.state
        if index % 2 and past and following:
            share = math.log(past / sigma) / math.log(past / following)  # r_1
            estimate = first + (D - first) / (2 * share)
            rows.add(sigma, estimate + following / past * (start - estimate))
        else:
            rows.add(sigma, D + following / sigma * (x - D), x, D)
        past = sigma
    return rows.table()


def dpmpp_2m(sigmas: Tensor) -> Table:
    """DPM-Solver++(2M): extrapolates the x0 estimate from this row's and the last row's; first order at both ends.

    Source: Lu et al. 2022, arXiv 2211.01095, algorithm 2.
    """
    rows, past = Rows(2), 0.0
    for sigma, following in steps(sigmas):
        x, last, D = rows.state
        estimate = D
        if past and following:
            ratio = math.log(past / sigma) / math.log(sigma / following)  # r_i
            estimate = D + (D - last) / (2 * ratio)
        rows.add(sigma, estimate + following / sigma * (x - estimate), D)
        past = sigma
    return rows.table()


def dpmpp_2m_sde(sigmas: Tensor) -> Table:
    """SDE-DPM-Solver++(2M): `dpmpp_2m` of the reverse-time SDE, midpoint form.

    Source: Lu et al. 2022, arXiv 2211.01095, Eq. 19 in section 6, halved D_1 as in algorithm 2.
    """
    rows, past = Rows(2), 0.0
    for sigma, following in steps(sigmas):
        x, last, D = rows.state
        estimate, ratio = D, following / sigma  # exp(-h)
        if past and following:
            estimate = D + (D - last) / (2 * math.log(past / sigma) / -math.log(ratio))
        rows.add(sigma, estimate + ratio**2 * (x - estimate), D, noise=following * math.sqrt(1 - ratio**2))
        past = sigma
    return rows.table()


def dpmpp_3m_sde(sigmas: Tensor) -> Table:
    """SDE-DPM-Solver++(3M): a parabola through the last three estimates over lambda, integrated exactly.

    Other implementations weigh the curvature with half of this factor, which makes them of order 2.

    Source: Lu et al. 2022, arXiv 2211.01095, section 6, with the third-order polynomial of Eq. 4.
    """
    rows, past = Rows(3), list[float]()
    for sigma, following in steps(sigmas):
        x, *earlier, D = rows.state
        ratio, step = following / sigma, 0.0
        change = np.zeros_like(D)
        if past and following:
            step = -math.log(ratio)
            places = [math.log(sigma / one) / step for one in past]  # of earlier estimates, in steps, below 0
            slope = (D - earlier[0]) / -places[0]
            phi_2 = 1 + math.expm1(-2 * step) / (2 * step)
            if len(past) == 2:
                before = (earlier[0] - earlier[1]) / (places[0] - places[1])
                curve = (slope - before) / -places[1]
                slope = slope - places[0] * curve
                change = (1 - phi_2 / step) * curve
            change = change + phi_2 * slope
        noise = following * math.sqrt(1 - ratio**2)
        rows.add(sigma, D + ratio**2 * (x - D) + change, D, *earlier[:1], noise=noise)
        past = [sigma, *past][:2]
    return rows.table()


def dpmpp_sde(sigmas: Tensor) -> Table:
    """DPM-Solver++ of the SDE in two stages, with r = 1/2; both stages see one Brownian path. Euler into sigma 0.

    Source: Lu et al. 2022, arXiv 2211.01095, section 6, stages as in its algorithm 1.
    """
    rows = Rows(3)
    for sigma, following in steps(sigmas):
        x, _, _, D = rows.state
        if following == 0:
            rows.add(sigma, D)
            continue
        middle = math.sqrt(sigma * following)
        down, up = _ancestral(sigma, middle)
        rows.add(sigma, D + down / sigma * (x - D), x, noise=up, keep_noise=True)
        _, start, first, D = rows.state
        down, up = _ancestral(sigma, following)
        share = (sigma - middle) / (sigma - following)  # of the path that the first stage has drawn
        jump = up * math.sqrt(share) * first
        rows.add(middle, D + down / sigma * (start - D) + jump, noise=up * math.sqrt(1 - share), between=True)
    return rows.table()


def unipc(sigmas: Tensor) -> Table:
    """UniPC of order 2, B(h) = exp(h) - 1: an estimate corrects the step that led to it, then predicts the next one.

    Source: Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2 for data prediction (appendix A), Eq. 12.
    """
    rows, past, order = Rows(4), list[float](), 0
    for index, (sigma, following) in enumerate(steps(sigmas)):
        predicted, x, last, before, D = rows.state
        if index == 0:
            x = predicted
        else:
            step = math.log(past[0] / sigma)
            phi_1, places = math.expm1(-step), [1.0]
            change = [D - last]
            if order == 2:
                places = [math.log(past[0] / past[1]) / step, 1.0]
                change = [(before - last) / places[0], D - last]
            targets = [(phi_1 / -step - 1) / phi_1, ((phi_1 / -step - 1) / -step - 0.5) * 2 / phi_1][:order]
            powers = np.array([[place**power for place in places] for power in range(order)])
            weights = np.linalg.solve(powers, targets) if order == 2 else [0.5]
            x = sigma / past[0] * x - phi_1 * (last + sum(w * part for w, part in zip(weights, change)))
        order = min(2, len(sigmas) - 1 - index, index + 1)
        estimate = D
        if order == 2:
            place = math.log(sigma / past[0]) / math.log(sigma / following)
            estimate = D + 0.5 * (last - D) / place
        rows.add(sigma, estimate + following / sigma * (x - estimate), x, D, last)
        past = [sigma, *past][:2]
    return rows.table()


def lcm(sigmas: Tensor, timesteps: Tensor) -> Table:
    """Consistency sampling: jump to the x0 estimate, then noise it to the next level.

    Args:
        sigmas: (N + 1,) float64, falling.
        timesteps: (N,), on which the boundary scalings depend; hardly, after the first few.

    Source: Luo et al. 2023, arXiv 2310.04378, algorithm 3; Eq. 9 with sigma_data 0.5 and timesteps times 10.
    """
    rows = Rows(1)
    for (sigma, following), timestep in zip(steps(sigmas), timesteps.tolist()):
        x, D = rows.state
        scaled = 10 * timestep / 0.5
        c_skip, c_out = 1 / (scaled**2 + 1), scaled / math.sqrt(scaled**2 + 1)
        rows.add(sigma, c_out * D + c_skip / math.hypot(1, sigma) * x, noise=following)
    return rows.table()


@dataclass(frozen=True)
class Sampler:
    """A solver, and the rule for its noise levels that users of its name expect.

    Attributes:
        table: sigmas (N + 1,) -> Table.
        rule: key of `DISCRETIZATION_RULES`.
        takes: other arguments of the table: "eta", "middles", "skipped", "timesteps", "variance".
    """

    table: Callable[..., Table]
    rule: str
    takes: tuple[str, ...] = ()


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, rule="ddpm", takes=("variance",)),
    "ddim": Sampler(ddim, rule="ddim", takes=("eta",)),
    "euler": Sampler(euler, rule="euler"),
    "euler_a": Sampler(euler_a, rule="heun"),
    "heun": Sampler(heun, rule="heun"),
    "dpm2": Sampler(dpm2, rule="heun"),
    "dpm2_a": Sampler(dpm2_a, rule="heun"),
    "lms": Sampler(lms, rule="heun"),
    "dpmpp_2s_a": Sampler(dpmpp_2s_a, rule="heun"),
    "dpmpp_2s": Sampler(dpmpp_2s, rule="dpm", takes=("skipped",)),
    "dpmpp_2m": Sampler(dpmpp_2m, rule="dpm"),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, rule="dpm"),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, rule="dpm"),
    "dpmpp_sde": Sampler(dpmpp_sde, rule="heun"),
    "unipc": Sampler(unipc, rule="dpm"),
    "deis": Sampler(deis, rule="deis"),
    "plms": Sampler(plms, rule="pndm"),
    "pndm": Sampler(pndm, rule="pndm", takes=("middles",)),
    "lcm": Sampler(lcm, rule="lcm", takes=("timesteps",)),
}


def _ancestral(sigma: float, following: float, eta: float = 1.0) -> tuple[float, float]:
    """Split a step: the level that the deterministic part goes down to, and the fresh noise up to `following`.

    Source: Song et al. 2021, arXiv 2010.02502, Eq. 16 divided by the next signal rate.
    """
    fresh = eta**2 * (1 - (following / sigma) ** 2)  # share of the variance
    return following * math.sqrt(1 - fresh), following * math.sqrt(fresh)
