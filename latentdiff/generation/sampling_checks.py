"""Checks of options about sampling, which load torch and are therefore the last."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from latentdiff.errors import InputError, shown
from latentdiff.generation.options import one_of

__all__ = ["LOADING_TORCH", "guidance_schedule_name", "sampler_name", "try_plan"]


def sampler_name(name: str, value: object) -> str:
    """Check the name of a sampler, or of the class of a scheduler object."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a name, got {shown(value)}; try euler_a")
    from latentdiff.diffusion.plan import EXTERNAL, parse_sampler  # which load torch
    from latentdiff.diffusion.tuned import TUNED

    if not value.startswith(EXTERNAL) and value != TUNED:
        parse_sampler(value)
    return value


def guidance_schedule_name(name: str, value: object) -> str:
    """Check the name of a guidance schedule."""
    from latentdiff.diffusion.guidance import GUIDANCE_SCHEDULES  # which loads torch

    return one_of(tuple(GUIDANCE_SCHEDULES))(name, value)


@lru_cache(64)
def try_plan(sampler: str, steps: int, given: str | None, strength: float, eta: float, resampling: int) -> None:
    """Make a plan of so many steps, or of any levels of the kind that is given: the model says how high they may be."""
    from latentdiff.diffusion.plan import EXTERNAL, make_plan
    from latentdiff.diffusion.schedule import NoiseSchedule
    from latentdiff.diffusion.tuned import TUNED

    if sampler == TUNED:
        _try_tuned(steps, given, strength, eta, resampling)
        return
    schedule, levels = NoiseSchedule(), dict[str, Any](num_inference_steps=steps)
    if given is not None:
        ends = {"timesteps": (len(schedule.sigmas) - 1.0, 0.0), "sigmas": (50.0, 0.05)}[given]
        levels = {given: [ends[0] + (ends[1] - ends[0]) * step / steps for step in range(steps)]}
    if not sampler.startswith(EXTERNAL):
        make_plan(schedule, sampler, **levels, strength=strength, eta=eta, resampling=resampling)


def _try_tuned(steps: int, given: str | None, strength: float, eta: float, resampling: int) -> None:
    """Refuse what the tuned sampler of no model can do; which steps it takes is for the model to say."""
    from latentdiff.diffusion.plan import skipped_steps

    skipped_steps(steps, strength)
    unused = {
        f"{given} by hand": given is not None,
        f"eta {eta:g}": eta > 0,
        f"resampling {resampling}": resampling > 1,
    }
    for what in (name for name, asked in unused.items() if asked):
        raise InputError(f"a tuned sampler has steps of its own, got {what}; leave that out, or choose dpmpp_2m")


LOADING_TORCH = (sampler_name, guidance_schedule_name)
