"""Plans: which rows there are, what resampling and levels by hand make of them, inversion, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.diffusion import (
    SAMPLERS,
    Call,
    NoiseSchedule,
    as_denoiser,
    draw_noise,
    image_generator,
    make_inversion_plan,
    make_plan,
    parse_sampler,
    sample,
    start,
)
from latentdiff.diffusion.plan import overshoot, overshoot_note
from latentdiff.errors import InputError
from tests.diffusion.test_samplers import (
    COSINE,
    SHAPE,
    STD,
    gaussian_denoise,
    gaussian_moments,
    gaussian_solution,
    network,
)


def test_resampling_takes_every_step_several_times() -> None:
    """At eta 0 on a network that always gives the same estimate, x keeps the variance that its level has."""
    once, thrice = (make_plan(COSINE, "dpmpp_2m", 5, resampling=times) for times in (1, 3))
    assert len(thrice) == 15 and torch.equal(thrice.timesteps, once.timesteps.repeat_interleave(3))
    assert torch.equal(thrice.matrices[2::3], once.matrices) and torch.equal(thrice.noise[2::3], once.noise)
    sigmas = [*once.sigmas.tolist(), 0.0]
    torch.testing.assert_close(thrice.noise[0::3, 0] ** 2, -torch.tensor(sigmas, dtype=torch.float64).square().diff())
    for sampler in ("heun", "dpmpp_sde", "unipc", "dpm2_a", "pndm", "dpmpp_2s"):
        with pytest.raises(InputError, match="resampling needs a sampler that calls the network once a step"):
            make_plan(COSINE, sampler, 5, resampling=2)
    with pytest.raises(InputError, match="resampling must be an integer from 1 to 100, got 0"):
        make_plan(COSINE, "ddim", 5, resampling=0)


def test_resampled_gaussian_keeps_its_variance() -> None:
    """Noising back and stepping again leaves the distribution of x at its level: the exact one stays exact."""
    schedule = NoiseSchedule(timestep_spacing="trailing")
    plans = [make_plan(schedule, "ddpm", 500, resampling=times) for times in (1, 4)]
    errors = [abs(gaussian_moments(plan)[1] / STD**2 - 1) for plan in plans]
    assert errors[1] < 2 * errors[0] < 0.1


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim", "heun"])
def test_sigmas_by_hand(sampler: str) -> None:
    chosen = make_plan(COSINE, sampler, 8)
    levels = COSINE.discretize(8, SAMPLERS[sampler].rule).sigmas.tolist()
    by_hand = make_plan(COSINE, sampler, sigmas=levels[:-1] if sampler == "ddim" else levels)
    torch.testing.assert_close(by_hand.matrices, chosen.matrices)
    torch.testing.assert_close(by_hand.timesteps, chosen.timesteps, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_sampling_with_another_schedule_than_that_of_training(sampler: str) -> None:
    """A network that knows its own timesteps alone is told the right ones for the levels of another schedule."""
    trained, other = COSINE, NoiseSchedule(beta_schedule="scaled_linear", timestep_spacing="trailing")
    table = trained.sigmas.log().numpy()

    def denoise(x: torch.Tensor, call: Call) -> torch.Tensor:
        sigmas = np.exp(np.interp(call.timesteps.double().numpy(), np.arange(len(table)), table))
        return gaussian_denoise(x, torch.from_numpy(sigmas).reshape(-1, 1, 1, 1))

    levels = other.discretize(200).sigmas
    plan = make_plan(trained, sampler, sigmas=levels.tolist())
    x = start(plan, draw_noise([image_generator(0)], SHAPE).double())
    *_, final = sample(denoise, plan, x)
    torch.testing.assert_close(final.x, gaussian_solution(x, float(levels[0]), 0.0), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("sigmas", "got"),
    [
        ([1.0, 2.0, 0.0], "1, 2, 0"),
        ([2.0, 2.0, 0.0], "2, 2, 0"),
        ([float("nan"), 1.0], "nan, 1"),
        ([3.0, 1.0, -1.0], "3, 1, -1"),
        ([1e9, 1.0], "1e.09, 1, 0"),
        ([], "none"),
        ([0.0], "0"),
    ],
)
def test_sigmas_that_do_not_fall_are_refused(sigmas: list[float], got: str) -> None:
    with pytest.raises(InputError, match=f"sigmas must fall from at most .* to at least 0, got {got}"):
        make_plan(NoiseSchedule(), "euler", sigmas=sigmas)


@pytest.mark.parametrize(
    ("timesteps", "got"),
    [([1, 2], "1, 2"), ([5, 5], "5, 5"), ([1000, 3], "1000, 3"), ([3, -1], "3, -1"), ([], "none"), ([[1]], "1")],
)
def test_timesteps_that_do_not_fall_are_refused(timesteps: Any, got: str) -> None:
    with pytest.raises(InputError, match=f"timesteps must fall from at most 999 to at least 0, got {got}"):
        make_plan(NoiseSchedule(), "euler", timesteps=timesteps)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_timesteps_by_hand_are_those_of_a_number_of_steps(sampler: str) -> None:
    chosen = make_plan(COSINE, sampler, 8)
    timesteps = COSINE.discretize(8, SAMPLERS[sampler].rule).timesteps
    by_hand = make_plan(COSINE, sampler, timesteps=timesteps.tolist())
    for name in ("timesteps", "sigmas", "matrices", "noise"):
        assert torch.equal(getattr(by_hand, name), getattr(chosen, name))
    assert by_hand.init_noise_sigma == chosen.init_noise_sigma


def test_overshoot_is_the_variance_that_standard_normal_data_gets() -> None:
    """1 for many steps, less for few; much more where a solver leaves noise or cannot start from pure noise."""
    schedule = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for sampler in [name for name in SAMPLERS if name != "lcm"]:  # which is for networks that solve the equation
        assert overshoot(make_plan(schedule, sampler, 200)) == pytest.approx(1, abs=0.05), sampler
        assert overshoot(make_plan(schedule, sampler, 20, strength=0.5)) < 1.2, sampler
    assert 0.2 < overshoot(make_plan(schedule, "euler", 4)) < 0.9
    assert overshoot(make_plan(schedule, "dpmpp_3m_sde_beta", 20)) > 3
    assert overshoot(make_plan(schedule, "dpmpp_3m_sde_karras", 30)) == pytest.approx(1, abs=0.05)
    pure = replace(schedule, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    assert overshoot(make_plan(pure, "plms", 25)) > 1000 and overshoot(make_plan(pure, "pndm", 25)) > 100
    assert overshoot(make_plan(pure, "plms", 25, strength=0.5)) < 1.1
    assert overshoot(make_plan(pure, "ddim", 25)) < 1
    told = overshoot_note(make_plan(pure, "plms", 25), "plms")
    assert told is not None and told.startswith("plms in 26 calls leaves noise or is unstable") and len(told) < 200
    assert overshoot_note(make_plan(pure, "ddim", 25), "ddim") is None


def test_steps_and_sigmas_exclude_each_other() -> None:
    with pytest.raises(InputError, match="either num_inference_steps or sigmas"):
        make_plan(COSINE, "euler")
    with pytest.raises(InputError, match="either num_inference_steps or sigmas"):
        make_plan(COSINE, "euler", 5, sigmas=[2.0, 1.0])
    with pytest.raises(InputError, match="either num_inference_steps or sigmas or timesteps"):
        make_plan(COSINE, "euler", 5, timesteps=[2, 1])
    with pytest.raises(InputError, match="timesteps are given, so euler_karras cannot space them; leave _karras out"):
        make_plan(COSINE, "euler_karras", timesteps=[2, 1])
    with pytest.raises(InputError, match="sigmas are given, so euler_karras cannot space them; leave _karras out"):
        make_plan(COSINE, "euler_karras", sigmas=[2.0, 1.0])


def test_image_to_image_starts_on_the_image() -> None:
    latents, noise = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    whole, part = make_plan(COSINE, "ddim", 10), make_plan(COSINE, "ddim", 10, strength=0.35)
    assert len(part) == 3
    assert torch.equal(part.sigmas, whole.sigmas[7:]) and torch.equal(part.timesteps, whole.timesteps[7:])
    torch.testing.assert_close(start(part, noise, latents), latents + float(part.sigmas[0]) * noise)


def test_the_first_row_of_a_cut_multistep_run_is_first_order() -> None:
    part = make_plan(COSINE, "dpmpp_2m", 10, strength=0.5)
    assert part.matrices[0, 0, 1] == 0 and part.matrices[1, 0, 1] != 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dddim", "sampler 'dddim' is unknown; did you mean 'ddim'"),
        ("euler_karas", "sampler 'euler_karas' is unknown; did you mean 'euler_karras'"),
        ("eular_karras", "sampler 'eular_karras' is unknown; did you mean 'euler_karras'"),
        ("euler_b", "sampler 'euler_b' is unknown; did you mean 'euler_a'"),
        ("dpmpp2m_karras", "did you mean 'dpmpp_2m_karras'"),
        ("zzz", "choose one of ddim, ddpm, deis"),
        ("", "choose one of"),
        (None, "sampler None is unknown"),
    ],
)
def test_unknown_sampler(name: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_sampler(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta must be a number from 0 to 1, got 1.5"),
        ({"eta": float("nan")}, "eta must be a number from 0 to 1"),
        ({"sampler": "euler", "eta": 0.5}, "eta is an option of ddim"),
        ({"strength": 0.0}, "strength must be a number above 0"),
        ({"strength": 1.01}, "strength must be a number above 0"),
        ({"strength": float("nan")}, "strength must be a number above 0"),
        ({"strength": 0.05}, "strength must leave at least one of 10 steps, got 0.05; try strength 0.1 or more steps"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000, got 0; try 20"),
        ({"num_inference_steps": 1001}, "from 1 to 1000, got 1001"),
    ],
)
def test_bad_plans(options: dict[str, Any], message: str) -> None:
    values = {"sampler": "ddim", "num_inference_steps": 10, **options}
    with pytest.raises(InputError, match=message):
        make_plan(COSINE, values.pop("sampler"), values.pop("num_inference_steps"), **values)


def test_inversion_finds_the_noise_that_a_run_started_from() -> None:
    schedule = NoiseSchedule(timestep_spacing="trailing", prediction_type="v_prediction")
    plan, noise = make_plan(schedule, "ddim", 20), draw_noise([image_generator(0)], SHAPE).double()
    denoise = as_denoiser(lambda x, call: 0.5 * network(x, call), "v_prediction")
    *_, drawn = sample(denoise, plan, start(plan, noise))
    errors = []
    for iterations in (1, 4, 30):
        *_, found = sample(denoise, make_inversion_plan(schedule, 20, iterations), drawn.x)
        errors.append(float((found.x - noise).abs().max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6
    with pytest.raises(InputError, match="iterations must be 1 or more, got 0"):
        make_inversion_plan(schedule, 20, 0)
