"""Samplers that extrapolate slopes or noise estimates of earlier steps: Adams-Bashforth, DEIS and PNDM.

See `samplers.py` for how they are written.
"""

from __future__ import annotations

import math

from numpy import ndarray
from torch import Tensor

from latentdiff.diffusion.table import Rows, Table, steps

__all__ = ["deis", "lms", "plms", "pndm"]

# The newest of so many noise estimates first: Adams-Bashforth weights for equal steps, Liu et al. 2022, Eq. 12.
BASHFORTH = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def lms(sigmas: Tensor) -> Table:
    """Adams-Bashforth of order 4 on uneven steps: a polynomial through the last slopes, integrated over sigma.

    Source: Zhang & Chen 2022, arXiv 2204.13902, Eq. 14 and 15 with rho = sigma (rhoAB-DEIS).
    """
    rows, past = Rows(4), list[float]()
    for sigma, following in steps(sigmas):
        x, *earlier, D = rows.state
        slopes = [(x - D) / sigma, *earlier]
        past = [sigma, *past[:3]]
        weights = _lagrange_integrals([place - sigma for place in past], following - sigma)
        rows.add(sigma, x + sum(w * slope for w, slope in zip(weights, slopes)), *slopes[:3])
    return rows.table()


def deis(sigmas: Tensor) -> Table:
    """DEIS of order 2: a line through the last two slopes over log(sigma), integrated over sigma.

    The last of fewer than 15 steps is of order 1, which is steadier.

    Source: Zhang & Chen 2022, arXiv 2204.13902, Eq. 14 and 15 with polynomials in log(rho) (the logrho form).
    """
    rows, past = Rows(2), 0.0
    for index, (sigma, following) in enumerate(steps(sigmas)):
        x, last, D = rows.state
        slope, step = (x - D) / sigma, following - sigma
        change = step * slope
        number_of_steps = len(sigmas) - 1
        last_of_few = number_of_steps < 15 and index == number_of_steps - 1
        if past and following and not last_of_few:
            # the integral of log(s) - log(sigma) from sigma to sigma'
            area = following * math.log(following / sigma) - step
            change = change + area / math.log(sigma / past) * (slope - last)
        rows.add(sigma, x + change, slope)
        past = sigma
    return rows.table()


def plms(sigmas: Tensor) -> Table:
    """PLMS: the last four noise estimates in Adams-Bashforth weights; the first step is done again as Heun would.

    Source: Liu et al. 2022, arXiv 2202.09778, Eq. 12 and algorithm 2 with Eq. 9 divided by the next signal rate; the
    start is that of Stable Diffusion; `pndm` has the paper's.
    """
    rows = Rows(4)
    for index, (sigma, following) in enumerate(steps(sigmas)):
        x, *earlier, D = rows.state
        noises = [(x - D) / sigma, *earlier][: index + 1]
        rows.add(sigma, x + (following - sigma) * _extrapolated(noises), *noises[:3])
        if index == 0 and len(sigmas) > 2:
            # Slot 1 holds the first noise estimate, so x - step * slot 1 is where the step began.
            x, first, *_, D = rows.state
            step = following - sigma
            rows.add(following, x - step * first + step * (first + (x - D) / following) / 2, first)
    return rows.table()


def pndm(sigmas: Tensor, middles: Tensor) -> Table:
    """PNDM: three Runge-Kutta steps of four calls each, then `plms`; no Runge-Kutta step goes into sigma 0.

    Args:
        sigmas: (N + 1,) float64, falling.
        middles: (N,) float64, noise level halfway in time between each timestep and the next.

    Source: Liu et al. 2022, arXiv 2202.09778, algorithm 2 with Eq. 9 divided by the next signal rate, Eq. 13 (start).
    """
    rows = Rows(6)  # x, where the step began, its weighed noise estimates so far, those of the last three steps
    for index, ((sigma, following), middle) in enumerate(zip(steps(sigmas), middles.tolist())):
        if index < 3 and following > 0:
            _runge_kutta(rows, sigma, middle, following)
        else:
            x, start, total, *earlier, D = rows.state
            noises = [(x - D) / sigma, *earlier][: index + 1]
            rows.add(sigma, x + (following - sigma) * _extrapolated(noises), start, total, *noises[:3])
    return rows.table()


def _runge_kutta(rows: Rows, sigma: float, middle: float, following: float) -> None:
    """Add the rows of a classical Runge-Kutta step of order 4 over the noise estimate."""
    step, half = following - sigma, middle - sigma
    x, _, _, *earlier, D = rows.state
    noise = (x - D) / sigma
    rows.add(sigma, x + half * noise, x, noise / 6, noise, *earlier[:2])
    for stage in (half, step):  # from where the step began to where the next call is
        x, start, total, *earlier, D = rows.state
        noise = (x - D) / middle
        rows.add(middle, start + stage * noise, start, total + noise / 3, *earlier, between=True)
    x, start, total, *earlier, D = rows.state
    rows.add(following, start + step * (total + (x - D) / following / 6), start, total, *earlier)


def _extrapolated(noises: list[ndarray]) -> ndarray:
    """Return the noise estimate to step with, of one to four estimates, the newest first."""
    return sum((weight * noise for weight, noise in zip(BASHFORTH[len(noises)], noises)), start=0 * noises[0])


def _lagrange_integrals(places: list[float], step: float) -> list[float]:
    """Return the integral from 0 to `step` of the polynomial that is 1 at a place and 0 at the others, for each place.

    By Simpson's rule, which is exact for polynomials through up to four places.
    """

    def basis(place: float, at: float) -> float:
        return math.prod((at - other) / (place - other) for other in places if other != place)

    return [step / 6 * (basis(place, 0) + 4 * basis(place, step / 2) + basis(place, step)) for place in places]
