"""diffusers' scheduler classes that a config may name, and what each of them takes where the config is silent."""

from __future__ import annotations

from typing import Any

__all__ = ["CLASS_DEFAULTS", "ONLY_SUPPORTED", "VP_SCHEDULERS"]

# diffusers' schedulers of the discrete-time VP process; the others (flow matching, EDM, ...) have another one.
VP_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}  # those of Stable Diffusion
# The noise process of a class whose config leaves it open, where that is not the default of `NoiseSchedule`.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DPMSolverSDEScheduler": _BETAS,
    "HeunDiscreteScheduler": _BETAS,
    "KDPM2AncestralDiscreteScheduler": _BETAS,
    "KDPM2DiscreteScheduler": _BETAS,
    "LCMScheduler": {"beta_schedule": "scaled_linear", **_BETAS},
    "TCDScheduler": {"beta_schedule": "scaled_linear", **_BETAS},
}

# Keys that change the noise process or the meaning of the network's output, with the values that leave both alone.
# All other foreign keys choose a sampler, which here the caller does by name.
ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "final_sigmas_type": ("zero", "sigma_min", None),
    "timestep_type": ("discrete", None),
    "trained_betas": (None,),
    "use_flow_sigmas": (False, None),
}
