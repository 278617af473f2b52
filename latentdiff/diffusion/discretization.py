"""The noise levels of one sampling run, and the rules by which families of diffusers' schedulers choose theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["DISCRETIZATION_RULES", "Discretization", "DiscretizationRule"]


class Discretization(NamedTuple):
    """Timesteps and noise levels of one sampling run.

    Attributes:
        timesteps: (N,) float64, falling, for the network; fractional under linspace or Karras spacing.
        sigmas: (N + 1,) float64, falling, the last one usually 0.
        init_noise_sigma: factor that makes standard normal noise the initial x.
    """

    timesteps: Tensor
    sigmas: Tensor
    init_noise_sigma: float


@dataclass(frozen=True)
class DiscretizationRule:
    """How one family of diffusers' schedulers chooses noise levels, where it differs from the others.

    Attributes:
        spacing: timestep spacing when the checkpoint names none.
        whole_timesteps: round the timesteps of linspace and Karras spacing.
        one_more_point: space steps + 1 points and drop the cleanest; Karras spans the whole training range.
        end: where a run stops: at noise level "zero", at the "first" training level, or as this key of the config says:
            "set_alpha_to_one" or "final_sigmas_type".
        alpha_to_one: what set_alpha_to_one is where the checkpoint leaves it open.
        unit_variance_start: initial noise scaled so that x_vp has variance 1, instead of x having sigma^2.
        pure_noise_sigma: stands in for the infinite sigma of the last timestep at zero terminal SNR.
    """

    spacing: str
    whole_timesteps: bool = True
    one_more_point: bool = False
    end: str = "zero"
    alpha_to_one: bool = True
    unit_variance_start: bool = True
    pure_noise_sigma: float = 2.0**30


DISCRETIZATION_RULES: dict[str, DiscretizationRule] = {
    "ddpm": DiscretizationRule("leading"),
    "ddim": DiscretizationRule("leading", end="set_alpha_to_one"),
    "pndm": DiscretizationRule("leading", end="set_alpha_to_one", alpha_to_one=False),
    "euler": DiscretizationRule(
        "linspace",
        whole_timesteps=False,
        end="final_sigmas_type",
        unit_variance_start=False,
        pure_noise_sigma=2.0**12,
    ),
    "heun": DiscretizationRule("linspace", whole_timesteps=False, unit_variance_start=False, pure_noise_sigma=2.0**12),
    "dpm": DiscretizationRule("linspace", one_more_point=True, pure_noise_sigma=2.0**12, end="final_sigmas_type"),
    "deis": DiscretizationRule("linspace", one_more_point=True, pure_noise_sigma=2.0**12, end="first"),
    "lcm": DiscretizationRule("lcm"),
}
