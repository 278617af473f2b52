"""The noise schedule: noise levels of the training timesteps, and their choice for a sampling run.

Everything a checkpoint's `scheduler_config.json` says about the noise process is here, and so is every habit of
diffusers' schedulers that changes a number (spacing, offset, last noise level, scale of the initial noise). Samplers
see nothing but a list of falling sigmas. Tables are float64; they are applied in float32 or the dtype of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.betas import BETA_SCHEDULES
from latentdiff.diffusion.discretization import DISCRETIZATION_RULES, Discretization, DiscretizationRule
from latentdiff.diffusion.forward import posterior_tables, rate_tables
from latentdiff.diffusion.prediction import PREDICTIONS, Thresholding
from latentdiff.diffusion.scheduler_classes import CLASS_DEFAULTS, ONLY_SUPPORTED, VP_SCHEDULERS
from latentdiff.diffusion.spacing import SIGMA_SPACINGS
from latentdiff.errors import InputError, ModelConfigError, suggest

__all__ = ["TIMESTEP_SPACINGS", "VARIANCES", "NoiseSchedule"]


TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
LCM_TIMESTEPS = 50  # at which consistency models are distilled, unless the checkpoint says otherwise


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(x_t | x_0) of a model, under diffusers' names.

    Attributes:
        timestep_spacing: "leading", "linspace", "trailing", or None for the usual one of each sampler's family.
        steps_offset: added to the timesteps of leading spacing (less where it would pass the last one).
        set_alpha_to_one: DDIM ends at noise level 0 (True) or at that of the first timestep (False); None for the usual
            end of each sampler.
        rescale_betas_zero_snr: shift the schedule so that the last timestep is pure noise.
        variance_type: of the steps of ddpm: "fixed_small", "fixed_large", or "learned_range" where the network's second
            half of channels says where between the two.
        class_name, extra: diffusers' class and the keys that are none of ours, kept for `to_dict`.

    Raises:
        InputError: a value out of range, or noise prediction at zero terminal SNR.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = True
    rescale_betas_zero_snr: bool = False
    variance_type: str = "fixed_small"
    class_name: str = "DDIMScheduler"
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _require_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _require_choice("prediction_type", self.prediction_type, PREDICTIONS)
        _require_choice("variance_type", self.variance_type, VARIANCES)
        if self.timestep_spacing is not None:
            _require_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        _require_integer("num_train_timesteps", self.num_train_timesteps, 1, 1_000_000, "1000")
        _require_integer("steps_offset", self.steps_offset, 0, self.num_train_timesteps - 1, "0 or 1")
        for name in ("set_alpha_to_one", "rescale_betas_zero_snr"):
            unset = name == "set_alpha_to_one" and self.set_alpha_to_one is None
            if not isinstance(getattr(self, name), bool) and not unset:
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}")
        ends = (self.beta_start, self.beta_end)
        if not all(isinstance(end, int | float) for end in ends) or not 0 < ends[0] <= ends[1] < 1:
            raise InputError(
                f"betas must satisfy 0 < beta_start <= beta_end < 1, got {ends[0]!r} and {ends[1]!r}; try 1e-4 and 0.02"
            )
        if self.ends_in_pure_noise and self.prediction_type == "epsilon":  # Lin et al. 2023, section 3.2
            remedy = (
                "choose another beta_schedule" if self.beta_schedule == "flow" else "rescale_betas_zero_snr to false"
            )
            raise InputError(
                "a schedule of zero terminal SNR needs a network that predicts more than the noise, got epsilon; "
                f"set prediction_type to v_prediction or sample, or {remedy}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers `scheduler_config.json`, or a mapping of our own fields written by hand.

        What a config leaves out is what its class takes by default; what only concerns sampling is left to the sampler.

        Raises:
            ModelConfigError: a diffusers config of another noise process, or with a value that cannot be honoured.
            InputError: a hand-written mapping (one without `_class_name`) with an unknown key or a bad value.
        """
        ours = {item.name for item in fields(cls)} - {"class_name", "extra"}
        known = {key: value for key, value in config.items() if key in ours}
        variance = known.pop("variance_type", None)
        if variance is not None:
            known["variance_type"] = str(variance).removesuffix("_log")  # of a fixed one, where that is no difference
        extra = {key: value for key, value in config.items() if key not in ours and key != "_class_name"}
        if "_class_name" not in config:
            for key in extra:
                raise InputError(f"schedule has no key {key!r}{suggest(str(key), ours)}")
            return cls(**known)
        name = str(config["_class_name"])
        if name not in VP_SCHEDULERS:
            raise ModelConfigError(
                f"scheduler must be of the discrete variance-preserving kind, got {name}{suggest(name, VP_SCHEDULERS)}"
            )
        for key, supported in ONLY_SUPPORTED.items():
            if extra.get(key) not in supported:
                raise ModelConfigError(
                    f"scheduler config has {key}={str(extra[key])[:80]}, supported: {supported[0]!r}"
                )
        try:
            known = {"set_alpha_to_one": None, **CLASS_DEFAULTS.get(name, {}), **known}
            schedule = cls(**known, class_name=name, extra=extra)
            _ = schedule.thresholding  # whose values are checked when it is made
        except InputError as error:
            raise ModelConfigError(f"scheduler config: {error}") from error
        return schedule

    def to_dict(self) -> dict[str, Any]:
        """Return a `scheduler_config.json` that diffusers loads to the same process."""
        ours = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("class_name", "extra")
        }
        for name in ("timestep_spacing", "set_alpha_to_one"):
            if ours[name] is None:
                del ours[name]
        if self.variance_type == "fixed_small":  # which is what those that have one default to
            del ours["variance_type"]
        # Latents have no range to clip to, but diffusers' DDIM and DDPM clip unless told.
        return {"_class_name": self.class_name, "clip_sample": False, **ours, **self.extra}

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64, falling: the share of signal variance in x_vp, alpha-bar of Ho et al. 2020, Eq. 4."""
        betas = BETA_SCHEDULES[self.beta_schedule](self.num_train_timesteps, self.beta_start, self.beta_end)
        alphas_cumprod = (1 - betas).cumprod(0)
        if not self.rescale_betas_zero_snr:
            return alphas_cumprod
        roots = alphas_cumprod.sqrt()  # Lin et al. 2023, arXiv 2305.08891, algorithm 1
        return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2

    @property
    def thresholding(self) -> Thresholding | None:
        """Dynamic thresholding of x0 estimates, where the config asks for it."""
        if not self.extra.get("thresholding"):
            return None
        keys = {"dynamic_thresholding_ratio": "ratio", "sample_max_value": "largest"}
        return Thresholding(**{name: self.extra[key] for key, name in keys.items() if key in self.extra})

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether the last timestep has no signal left, zero terminal SNR."""
        return self.rescale_betas_zero_snr or self.beta_schedule == "flow"

    @cached_property
    def sigmas(self) -> Tensor:
        """(T,) float64, rising: sqrt((1 - alphas_cumprod) / alphas_cumprod), infinite at zero terminal SNR."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio alpha^2 / sigma^2 at timesteps (B,) int64, as (B,) float32.

        Source: Kingma et al. 2021, arXiv 2107.00630, section 3.1.
        """
        return self.on("snr", timesteps.device, torch.float32)[0, timesteps]

    def sigma_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return the noise levels (B, 1, 1, 1) at timesteps (B,), in at least float32 on the device of `like`."""
        (sigmas,) = self._at("sigmas", timesteps, like)
        return sigmas

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw x_t of the forward process q(x_t | x_0) as the network sees it in training (`prediction.py`).

        Args:
            x0, noise: (B, C, H, W), data (or scaled latents) and standard normal noise.
            timesteps: (B,) int64 in [0, num_train_timesteps).

        Returns:
            (B, C, H, W), at least float32.

        Source: Ho et al. 2020, arXiv 2006.11239, Eq. 4.
        """
        signal_rate, noise_rate = self._at("rates", timesteps, x0)
        return signal_rate * x0 + noise_rate * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should output for `add_noise` of the same arguments, (B, C, H, W)."""
        return PREDICTIONS[self.prediction_type].target(x0, noise, *self._at("rates", timesteps, x0))

    def timesteps_of(self, sigmas: Tensor) -> Tensor:
        """Return the timesteps (N,) float64 of noise levels (N,), between trained ones linear in log(sigma)."""
        table = self.sigmas.clamp(max=2.0**30).log().numpy()
        return torch.from_numpy(np.interp(np.log(sigmas.numpy()), table, np.arange(len(table))))

    def posterior(
        self, x0: Tensor, x_t: Tensor, timesteps: Tensor, variance: str | Tensor = "fixed_small"
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(x_{t-1} | x_t, x_0), in VP coordinates.

        Args:
            x0, x_t: (B, C, H, W).
            timesteps: (B,) int64; at 0 the mean is x0, and a fixed variance, which would be 0, is the small one at 1.
            variance: "fixed_small", that of the posterior, "fixed_large", beta, or (B, C, H, W) as a network learns it,
                -1 for the small one and 1 for beta.

        Returns:
            (B, C, H, W) and (B, 1, 1, 1), or (B, C, H, W) where learned.

        Raises:
            InputError: unknown variance.

        Source: Ho et al. 2020, arXiv 2006.11239, Eq. 6 and 7, section 3.2; Nichol & Dhariwal 2021, arXiv 2102.09672,
        Eq. 15.
        """
        of_x0, of_x_t, small, large, beta = self._at("posterior", timesteps, x0)
        mean = of_x0 * x0 + of_x_t * x_t  # Eq. 7
        if isinstance(variance, Tensor):
            return mean, torch.lerp(small.expand_as(variance), beta.expand_as(variance), (variance + 1) / 2)  # Eq. 15
        _require_choice("variance", variance, VARIANCES[:2])
        return mean, small if variance == "fixed_small" else large

    def on(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return numbers of every timestep on a device, to which they are sent once.

        Args:
            name: "alphas_cumprod", "sigmas" or "snr", (1, T); "rates", of signal and noise in what the network sees,
                (2, T); "posterior", see `posterior`, (5, T).
            device, dtype: of the result; computed in float64.
        """
        key = (name, device, dtype)
        if key not in self._sent:
            self._sent[key] = self._tables(name).to(device, dtype)
        return self._sent[key]

    @cached_property
    def _sent(self) -> dict[tuple[str, torch.device, torch.dtype], Tensor]:
        return {}

    def _tables(self, name: str) -> Tensor:
        if name == "posterior":
            return posterior_tables(self.alphas_cumprod)
        if name == "rates":
            return rate_tables(self.alphas_cumprod, PREDICTIONS[self.prediction_type].power)
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        return {"alphas_cumprod": self.alphas_cumprod, "sigmas": self.sigmas, "snr": snr}[name][None]

    def discretize(
        self, num_inference_steps: int, rule: str = "ddim", sigma_spacing: str | None = None
    ) -> Discretization:
        """Choose the noise levels that a sampling run visits.

        Args:
            num_inference_steps: 1 to num_train_timesteps.
            rule: key of `DISCRETIZATION_RULES`, the family of schedulers whose habits to follow.
            sigma_spacing: a key of `SIGMA_SPACINGS`, to space noise levels instead of timesteps.

        Raises:
            InputError: step count out of range.

        Source: Lin et al. 2023, arXiv 2305.08891, table 2 (spacings); Karras et al. 2022, arXiv 2206.00364, Eq. 5.
        """
        _require_integer("num_inference_steps", num_inference_steps, 1, self.num_train_timesteps, "20")
        habits = DISCRETIZATION_RULES[rule]
        spacing = habits.spacing if habits.spacing == "lcm" else self.timestep_spacing or habits.spacing
        timesteps = self._spaced(num_inference_steps, spacing, habits)  # (N,)
        indices, table = np.arange(self.num_train_timesteps), self._levels(habits)  # (T,)
        sigmas = np.interp(timesteps, indices, table)  # (N,)
        if sigma_spacing is not None:
            ends = (table[-1], table[0]) if habits.one_more_point else (sigmas[0], sigmas[-1])
            sigmas = SIGMA_SPACINGS[sigma_spacing](*ends, num_inference_steps)
            timesteps = np.interp(np.log(sigmas), np.log(table), indices)
            timesteps = timesteps.round() if habits.whole_timesteps else timesteps
        return self._stopped(timesteps, sigmas, habits)

    def at_timesteps(self, timesteps: Sequence[float] | np.ndarray, rule: str = "ddim") -> Discretization:
        """Return the noise levels of timesteps that were chosen by hand.

        Args:
            timesteps: falling, from at most num_train_timesteps - 1 to at least 0.
            rule: as in `discretize`.

        Raises:
            InputError: the timesteps do not fall, or leave the range.
        """
        places, last = np.asarray(timesteps, dtype=np.float64), self.num_train_timesteps - 1
        falling = places.ndim == 1 and len(places) and (np.diff(places) < 0).all()
        if not falling or not 0 <= places[-1] <= places[0] <= last:
            got = ", ".join(f"{place:g}" for place in places.ravel()[:6])
            raise InputError(f"timesteps must fall from at most {last} to at least 0, got {got or 'none'}")
        habits = DISCRETIZATION_RULES[rule]
        sigmas = np.interp(places, np.arange(self.num_train_timesteps), self._levels(habits))
        return self._stopped(places, sigmas, habits)

    def at_sigmas(self, sigmas: Sequence[float], rule: str = "ddim") -> Discretization:
        """Return the timesteps of noise levels that were chosen by hand.

        Args:
            sigmas: falling, within what the model was trained on; a last one of 0 is added where it is missing.
            rule: as in `discretize`.

        Raises:
            InputError: the levels do not fall, or leave the range.
        """
        levels = torch.tensor([float(sigma) for sigma in sigmas], dtype=torch.float64)
        if len(levels) and float(levels[-1]) > 0:
            levels = torch.cat([levels, levels.new_zeros(1)])
        highest = float(self.sigmas[-1]) * (1 + 1e-6)  # of a level that was rounded on its way
        if len(levels) < 2 or not (levels.diff() < 0).all() or not 0 <= levels[-1] < levels[0] <= highest:
            got = ", ".join(f"{level:.4g}" for level in levels[:6].tolist())
            raise InputError(f"sigmas must fall from at most {highest:.4g} to at least 0, got {got or 'none'}")
        return Discretization(
            self.timesteps_of(levels[:-1]), levels, self._initial_scale(float(levels[0]), DISCRETIZATION_RULES[rule])
        )

    def _levels(self, habits: DiscretizationRule) -> np.ndarray:
        """Return the training noise levels (T,), rising, all of them finite."""
        levels: np.ndarray = self.sigmas.numpy().copy()
        if self.ends_in_pure_noise:
            levels[-1] = habits.pure_noise_sigma
        return levels

    def _stopped(self, timesteps: np.ndarray, sigmas: np.ndarray, habits: DiscretizationRule) -> Discretization:
        """Return timesteps and sigmas, each (N,), with the level that a run stops at."""
        # Spaced levels may end there already; solvers divide by the length of a step, which is then almost 0.
        last = min(float(self.sigmas[0]), float(sigmas[-1]) * (1 - 1e-9)) if self._stops_early(habits) else 0.0
        scale = self._initial_scale(float(sigmas[0]), habits)
        return Discretization(torch.from_numpy(timesteps), torch.from_numpy(np.append(sigmas, last)), scale)

    def _initial_scale(self, sigma: float, habits: DiscretizationRule) -> float:
        """Return the factor that makes standard normal noise the initial x at a noise level."""
        leading = (self.timestep_spacing or habits.spacing) == "leading"
        return math.hypot(1, sigma) if habits.unit_variance_start or leading else sigma

    def _stops_early(self, habits: DiscretizationRule) -> bool:
        """Return whether a run stops at the first training noise level, and not at 0."""
        if habits.end == "set_alpha_to_one":
            return not (habits.alpha_to_one if self.set_alpha_to_one is None else self.set_alpha_to_one)
        if habits.end == "final_sigmas_type":
            return self.extra.get("final_sigmas_type") == "sigma_min"
        return habits.end == "first"

    def _spaced(self, steps: int, spacing: str, habits: DiscretizationRule) -> np.ndarray:
        """Return the timesteps (N,), falling. Source: Lin et al. 2023, arXiv 2305.08891, table 2."""
        count = self.num_train_timesteps
        points = steps + 1 if habits.one_more_point and steps < count else steps
        if spacing == "trailing":
            # arange, whose rounding errors decide ties, gives the timesteps that diffusers gives.
            return np.arange(count, 0, -count / steps)[:steps].round() - 1
        if spacing == "lcm":
            # Every 20th timestep was distilled, of which evenly many are visited: Luo et al. 2023, arXiv 2310.04378.
            distilled = self.extra.get("original_inference_steps", LCM_TIMESTEPS)
            _require_integer("num_inference_steps of lcm", steps, 1, distilled, "4")
            picked = np.arange(distilled, 0, -1)[np.linspace(0, distilled, steps, endpoint=False).astype(int)]
            return picked * (count // distilled) - 1.0
        if spacing == "leading":
            timesteps = np.arange(points, dtype=np.float64) * (count // points)
            timesteps += min(self.steps_offset, count - 1 - timesteps[-1])
        else:
            timesteps = np.linspace(0, count - 1, points) if points > 1 else np.array([count - 1.0])
            timesteps = timesteps.round() if habits.whole_timesteps else timesteps
        return timesteps[::-1][:steps].copy()

    def _at(self, name: str, timesteps: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """Return the entries (B, 1, 1, 1) of tables, in at least float32, on the device of `like`."""
        tables = self.on(name, like.device, torch.promote_types(like.dtype, torch.float32))
        entries = tables[:, timesteps.to(like.device)]  # (n, B)
        return entries.reshape(*entries.shape, *[1] * (like.ndim - 1)).unbind()


def _require_choice(name: str, value: object, choices: Mapping[str, Any] | tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} {value!r} is unknown{suggest(str(value), choices)}")


def _require_integer(name: str, value: object, low: int, high: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise InputError(f"{name} must be an integer from {low} to {high}, got {value!r}; try {remedy}")
