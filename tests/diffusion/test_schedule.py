"""The noise schedule: tables with known values, spacings, configs of checkpoints, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.diffusion import NoiseSchedule
from latentdiff.diffusion.betas import BETA_SCHEDULES
from latentdiff.diffusion.discretization import DISCRETIZATION_RULES
from latentdiff.diffusion.scheduler_classes import CLASS_DEFAULTS
from latentdiff.diffusion.spacing import SIGMA_SPACINGS
from latentdiff.errors import InputError, ModelConfigError

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@pytest.mark.parametrize("beta_schedule", list(BETA_SCHEDULES))
def test_tables_are_float64_and_monotonic(beta_schedule: str) -> None:
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type="v_prediction")
    assert schedule.alphas_cumprod.shape == schedule.sigmas.shape == (1000,)
    assert schedule.alphas_cumprod.dtype == schedule.sigmas.dtype == torch.float64
    assert (schedule.alphas_cumprod.diff() < 0).all() and (schedule.sigmas.diff() > 0).all()


def test_stable_diffusion_has_the_sigmas_everybody_quotes() -> None:
    schedule = NoiseSchedule.from_dict(STABLE_DIFFUSION)
    assert float(schedule.sigmas[0]) == pytest.approx(0.0292, abs=1e-4)
    assert float(schedule.sigmas[-1]) == pytest.approx(14.6146, abs=1e-4)


def test_cosine_follows_its_closed_form() -> None:
    alphas_cumprod = NoiseSchedule(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    time = (np.arange(1, 1000) / 1000 + 0.008) / 1.008 * math.pi / 2
    np.testing.assert_allclose(alphas_cumprod[:-1], (np.cos(time) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2)
    assert float(alphas_cumprod[-1] / alphas_cumprod[-2]) == pytest.approx(0.001)  # beta capped at 0.999


def test_angles_rise_evenly() -> None:
    schedule = NoiseSchedule(beta_schedule="angle")
    angles = torch.atan2((1 - schedule.alphas_cumprod).sqrt(), schedule.alphas_cumprod.sqrt())
    torch.testing.assert_close(angles.diff(), angles.diff()[:1].expand(999))
    assert float(schedule.alphas_cumprod[0].sqrt()) == pytest.approx(0.95)
    assert float(schedule.alphas_cumprod[-1].sqrt()) == pytest.approx(0.02)


def test_flow_mixes_data_and_noise_in_a_straight_line() -> None:
    schedule = NoiseSchedule(beta_schedule="flow", prediction_type="flow_prediction")
    x0, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    timesteps = torch.tensor([0, 499, 999])
    torch.testing.assert_close(schedule.add_noise(x0, noise, timesteps), (1 - time) * x0 + time * noise)
    torch.testing.assert_close(schedule.target(x0, noise, timesteps), noise - x0)


def test_posterior_agrees_with_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), two Gaussians."""
    schedule, timesteps = NoiseSchedule(beta_schedule="sigmoid"), torch.tensor([1, 10, 999])
    x0, x_t = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, log_variance = schedule.posterior(x0, x_t, timesteps)
    before, after = (schedule.alphas_cumprod[timesteps - 1 + k].reshape(-1, 1, 1, 1) for k in (0, 1))
    alpha = after / before
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    torch.testing.assert_close(log_variance.exp(), 1 / precision)
    torch.testing.assert_close(mean, (alpha.sqrt() / (1 - alpha) * x_t + before.sqrt() / (1 - before) * x0) / precision)
    torch.testing.assert_close(schedule.posterior(x0, x_t, timesteps, "fixed_large")[1].exp(), 1 - alpha)
    assert torch.equal(schedule.posterior(x0, x_t, torch.zeros(3, dtype=torch.int64))[0], x0)
    with pytest.raises(InputError, match="did you mean 'fixed_small'"):
        schedule.posterior(x0, x_t, timesteps, "fixed_smal")


def test_zero_terminal_snr_keeps_the_first_timestep() -> None:
    plain = NoiseSchedule(prediction_type="v_prediction")
    rescaled = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0 and rescaled.snr(torch.tensor([999])) == 0
    assert float(rescaled.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-12)
    for rule in DISCRETIZATION_RULES:
        assert torch.isfinite(rescaled.discretize(5, rule).sigmas).all()


def test_snr_is_signal_over_noise() -> None:
    schedule, timesteps = NoiseSchedule(), torch.tensor([0, 10, 999])
    torch.testing.assert_close(schedule.snr(timesteps), (schedule.sigmas[timesteps] ** -2).float())


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [("leading", [751, 501, 251, 1]), ("linspace", [999, 666, 333, 0]), ("trailing", [999, 749, 499, 249])],
)
def test_spacings(spacing: str, timesteps: list[int]) -> None:
    schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=1)
    grid = schedule.discretize(4, "ddim")
    assert grid.timesteps.tolist() == timesteps
    torch.testing.assert_close(grid.sigmas[:-1], schedule.sigmas[timesteps])
    assert grid.sigmas[-1] == 0


@pytest.mark.parametrize("rule", [rule for rule in DISCRETIZATION_RULES if rule != "lcm"])
@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 61, 499, 999, 1000])
@pytest.mark.parametrize("levels", [None, *SIGMA_SPACINGS])
def test_grids_fall_inside_the_training_range(rule: str, spacing: str | None, steps: int, levels: str | None) -> None:
    schedule = NoiseSchedule(beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing, steps_offset=1)
    timesteps, sigmas, init_noise_sigma = schedule.discretize(steps, rule, levels)
    assert timesteps.shape == (steps,) and sigmas.shape == (steps + 1,)
    assert timesteps.dtype == sigmas.dtype == torch.float64
    assert (sigmas[:-1].diff() < 0).all() and sigmas[-1] <= sigmas[-2] and (timesteps.diff() <= 0).all()
    assert timesteps[0] <= 999 and timesteps[-1] >= 0
    assert init_noise_sigma >= sigmas[0]


def test_sigma_spacings_are_even_in_their_own_measure() -> None:
    for name, measure in (("karras", lambda s: s ** (1 / 7)), ("exponential", torch.log)):
        levels = measure(NoiseSchedule().discretize(10, "euler", name).sigmas[:-1])
        torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(9))


def test_consistency_models_visit_the_timesteps_they_were_distilled_at() -> None:
    assert NoiseSchedule().discretize(4, "lcm").timesteps.tolist() == [999, 759, 499, 259]
    with pytest.raises(InputError, match="num_inference_steps of lcm must be an integer from 1 to 50, got 51; try 4"):
        NoiseSchedule().discretize(51, "lcm")


def test_ddim_ends_where_the_checkpoint_says() -> None:
    schedule = NoiseSchedule.from_dict(STABLE_DIFFUSION)
    assert schedule.discretize(10, "ddim").sigmas[-1] == schedule.sigmas[0]
    assert schedule.discretize(10, "euler").sigmas[-1] == 0


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, float("nan"), True, "20", None])
def test_bad_step_counts(steps: Any) -> None:
    with pytest.raises(InputError, match=r"num_inference_steps must be an integer from 1 to 1000, got .*; try"):
        NoiseSchedule().discretize(steps)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta_schedule": "scaled_liner"}, "did you mean 'scaled_linear'"),
        ({"beta_schedule": ["linear"]}, "beta_schedule"),
        ({"prediction_type": "eps"}, "prediction_type 'eps' is unknown"),
        ({"timestep_spacing": "trailling"}, "did you mean 'trailing'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer from 1"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps must be an integer from 1"),
        ({"steps_offset": -1}, "steps_offset must be an integer from 0"),
        ({"beta_start": float("nan")}, "0 < beta_start <= beta_end < 1"),
        ({"beta_end": 1.0}, "0 < beta_start <= beta_end < 1"),
        ({"beta_end": "0.02"}, "0 < beta_start <= beta_end < 1"),
        ({"set_alpha_to_one": "false"}, "set_alpha_to_one must be true or false"),
        ({"rescale_betas_zero_snr": True}, "set prediction_type to v_prediction"),
        ({"beta_schedule": "flow"}, "set prediction_type to v_prediction or sample, or choose another beta_schedule"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NoiseSchedule(**values)
    with pytest.raises(ModelConfigError, match=message):
        NoiseSchedule.from_dict({**values, "_class_name": "DDIMScheduler"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        ({"_class_name": 3}, "variance-preserving"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 2}, "dynamic_thresholding_ratio must be .* from 0 to 1"),
        ({"thresholding": True, "sample_max_value": "1"}, "sample_max_value must be a number above 0, got '1'"),
        ({"final_sigmas_type": "sigma_max"}, "final_sigmas_type=sigma_max, supported: 'zero'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"variance_type": "learned"}, "variance_type 'learned' is unknown; did you mean 'learned_range'"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_configs_of_other_processes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        NoiseSchedule.from_dict({"_class_name": "DDIMScheduler", **values})


def test_hand_written_keys_are_checked() -> None:
    with pytest.raises(InputError, match="no key 'beta_shedule'; did you mean 'beta_schedule'"):
        NoiseSchedule.from_dict({"beta_shedule": "linear"})


def test_config_comes_back_unchanged() -> None:
    schedule = NoiseSchedule.from_dict(STABLE_DIFFUSION)
    saved = schedule.to_dict()
    assert STABLE_DIFFUSION.items() <= saved.items() and "timestep_spacing" not in saved
    assert NoiseSchedule.from_dict(saved) == schedule
    assert hash(schedule) == hash(copy.deepcopy(schedule))


@pytest.mark.parametrize("name", sorted(CLASS_DEFAULTS))
def test_what_a_config_leaves_out_is_what_its_class_takes(name: str) -> None:
    schedule = NoiseSchedule.from_dict({"_class_name": name})
    found = {key: getattr(schedule, key) for key in CLASS_DEFAULTS[name]}
    assert found == CLASS_DEFAULTS[name]
    assert CLASS_DEFAULTS[name].items() <= schedule.to_dict().items()
    assert NoiseSchedule.from_dict({"_class_name": name, "beta_start": 0.001}).beta_start == 0.001


def test_an_end_left_open_is_the_usual_one_of_the_sampler() -> None:
    """In diffusers DDIM ends at noise level 0 and PNDM at the first training level, unless the config has a say."""
    schedule = NoiseSchedule.from_dict({"_class_name": "PNDMScheduler"})
    assert schedule.set_alpha_to_one is None and "set_alpha_to_one" not in schedule.to_dict()
    assert schedule.discretize(10, "ddim").sigmas[-1] == 0
    torch.testing.assert_close(schedule.discretize(10, "pndm").sigmas[-1], schedule.sigmas[0], rtol=1e-8, atol=0)
    for chosen in (True, False):
        schedule = NoiseSchedule.from_dict({"_class_name": "PNDMScheduler", "set_alpha_to_one": chosen})
        for rule in ("ddim", "pndm"):
            assert (schedule.discretize(10, rule).sigmas[-1] == 0) == chosen
