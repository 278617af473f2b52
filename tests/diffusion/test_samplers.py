"""Sampler tables: order of convergence and variance on Gaussian data, mixed batches, seeds, float32, refusals."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentdiff.diffusion import (
    SAMPLERS,
    Call,
    Known,
    NoiseSchedule,
    Plan,
    as_denoiser,
    draw_noise,
    image_generator,
    make_inversion_plan,
    make_plan,
    parse_sampler,
    sample,
    start,
)
from latentdiff.diffusion.solvers import (
    ddim,
    ddpm,
    deis,
    dpm2,
    dpmpp_2m,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler,
    euler_a,
    heun,
    lms,
    unipc,
)
from latentdiff.diffusion.table import Table
from latentdiff.errors import InputError

SHAPE = (2, 4, 4)
MEAN, STD = 0.3, 0.5  # of the Gaussian data
COSINE = NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")


def gaussian_denoise(x: Tensor, sigmas: Tensor) -> Tensor:
    """The exact x0 estimate for data N(MEAN, STD^2)."""
    return MEAN + STD**2 / (STD**2 + sigmas**2) * (x - MEAN)


def gaussian_solution(x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
    """The exact solution of the probability-flow ODE dx/dsigma = (x - denoise) / sigma for data N(MEAN, STD^2)."""
    return MEAN + (x - MEAN) * ((STD**2 + sigma_to**2) / (STD**2 + sigma_from**2)) ** 0.5


def table_plan(table: Table) -> Plan:
    return Plan(torch.zeros_like(table.sigmas), table.sigmas, table.matrices, table.noise, 1.0, table.noise_range)


def network(x: Tensor, call: Call) -> Tensor:
    """A nonlinear network with an output of order 1, different for each image of the batch."""
    time, own = (value.to(x.dtype).reshape(-1, 1, 1, 1) for value in (call.timesteps, call.images))
    return 0.8 * torch.sin(1.3 * x + 0.003 * time + own) + 0.2 * x.roll(1, -1)


def run(
    plans: Any, seeds: list[int], schedule: NoiseSchedule = COSINE, images: list[int] | None = None
) -> list[Tensor]:
    """x after each row; `images` gives the images of a solo run the numbers they have in the batch."""
    own = torch.tensor(images if images is not None else list(range(len(seeds))))
    generators = [image_generator(seed) for seed in seeds]
    x = start(plans, draw_noise(generators, SHAPE))

    def renumbered(inner: Tensor, call: Call) -> Tensor:
        return network(inner, Call(call.index, own[call.images], call.rows, call.sigmas, call.timesteps))

    return [step.x for step in sample(as_denoiser(renumbered, schedule.prediction_type), plans, x, generators)]


@pytest.mark.parametrize(
    ("solver", "order", "coarsest"),
    [
        (euler, 1, 40),
        (ddim, 1, 40),
        (heun, 2, 40),
        (dpm2, 2, 40),
        (dpmpp_2m, 2, 40),
        (deis, 2, 40),
        # Its steps are of order 3, only the first and the last one, of order 1, make it 2 when all others are exact.
        (unipc, 2, 800),
        # Until the first steps, of order 1 to 3, weigh more than the rest.
        (lms, 3.65, 40),
    ],
)
def test_order_of_convergence(solver: Any, order: float, coarsest: int) -> None:
    first, last = 20.0, 0.05
    x = torch.linspace(-30, 30, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    exact, errors = gaussian_solution(x, first, last), []
    for rows in (coarsest, 2 * coarsest, 4 * coarsest):
        sigmas = torch.from_numpy(np.geomspace(first, last, rows + 1))
        plan = table_plan(solver(sigmas))
        *_, final = sample(lambda x, call: gaussian_denoise(x, call.sigmas.reshape(-1, 1, 1, 1)), plan, x)
        errors.append(float((final.x - exact).abs().max()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.15)


@pytest.mark.parametrize("solver", [euler, ddpm, euler_a, dpmpp_2m, lambda sigmas: ddim(sigmas, 0.5)])
def test_one_exact_estimate_is_reached_in_one_row(solver: Any) -> None:
    """If the estimate is always the same, every solver lands on it, and adds up to no more noise than sigma'."""
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    table = solver(sigmas)
    of_x, of_estimates = table.matrices[:, 0, 0], table.matrices[:, 0, 1:].sum(-1)
    torch.testing.assert_close(of_x + of_estimates, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((of_x * sigmas[:-1]) ** 2 + table.noise[:, 0] ** 2, sigmas[1:] ** 2)


def gaussian_moments(plan: Plan) -> tuple[float, float]:
    """Mean and variance of a plan's samples, without drawing any: on Gaussian data a row is x' = a x + b + n noise."""
    mean, variance = 0.0, plan.init_noise_sigma**2
    for sigma, matrix, noise in zip(plan.sigmas, plan.matrices[:, 0], plan.noise[:, 0]):
        slope = STD**2 / (STD**2 + sigma**2)
        mean = float((matrix[0] + matrix[1] * slope) * mean + matrix[1] * MEAN * (1 - slope))
        variance = float((matrix[0] + matrix[1] * slope) ** 2 * variance + noise**2)
    return mean, variance


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("euler_a", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_ancestral_sampling_reproduces_the_variance(sampler: str, eta: float) -> None:
    """What the small posterior variance lacks falls in proportion to the step size."""
    schedule = NoiseSchedule(timestep_spacing="trailing")
    moments = [gaussian_moments(make_plan(schedule, sampler, steps, eta=eta)) for steps in (250, 500, 1000)]
    errors = np.array([abs(variance / STD**2 - 1) for _, variance in moments])
    np.testing.assert_allclose(errors[1:] / errors[:-1], 0.5, atol=0.05)
    assert errors[-1] < 0.02
    assert moments[-1][0] == pytest.approx(MEAN, abs=0.005)


def test_drawn_samples_have_the_moments_of_the_table() -> None:
    plan = make_plan(NoiseSchedule(timestep_spacing="trailing"), "ddpm", 50)
    generators = [image_generator(seed) for seed in range(4)]
    x = start(plan, draw_noise(generators, (1, 64, 64)))
    *_, final = sample(lambda x, call: gaussian_denoise(x, call.sigmas.reshape(-1, 1, 1, 1)), plan, x, generators)
    mean, variance = gaussian_moments(plan)
    assert float(final.x.mean()) == pytest.approx(mean, abs=0.02)
    assert float(final.x.var()) == pytest.approx(variance, rel=0.04)


def test_ddim_and_euler_are_one_table() -> None:
    sigmas = COSINE.sampling_grid(10).sigmas
    for first, second in (
        (ddim(sigmas), euler(sigmas)),
        (ddim(sigmas, 1.0), ddpm(sigmas)),
        (ddpm(sigmas), euler_a(sigmas)),
    ):
        assert torch.equal(first.matrices, second.matrices) and torch.equal(first.noise, second.noise)


def test_ddpm_is_the_posterior_of_the_forward_process() -> None:
    """Ho et al. 2020, Eq. 7, written in VP coordinates and its own symbols."""
    schedule = NoiseSchedule()
    alpha_bar, beta = schedule.alphas_cumprod, 1 - schedule.alphas_cumprod[1:] / schedule.alphas_cumprod[:-1]
    of_x0 = alpha_bar[:-1].sqrt() * beta / (1 - alpha_bar[1:])
    of_x = (1 - beta).sqrt() * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    variance = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta
    table = ddpm(schedule.sigmas.flip(0))
    before, after = alpha_bar[1:].sqrt().flip(0), alpha_bar[:-1].sqrt().flip(0)
    torch.testing.assert_close(table.matrices[:, 0, 0] * after / before, of_x.flip(0))
    torch.testing.assert_close(table.matrices[:, 0, 1] * after, of_x0.flip(0))
    torch.testing.assert_close(table.noise[:, 0] * after, variance.sqrt().flip(0))


def test_third_order_solver_takes_a_parabola_exactly() -> None:
    """If estimates follow a parabola in lambda, the integral the table takes without noise is the exact one."""
    levels = torch.tensor([8.0, 5.0, 2.5, 1.0], dtype=torch.float64)
    table = dpmpp_3m_sde(levels)
    estimates = [0.7 - 0.4 * math.log(level) + 0.3 * math.log(level) ** 2 for level in levels.tolist()]
    sigma, following = levels[-2:].tolist()
    of_x, *of_memory, of_estimate = table.matrices[-1, 0].tolist()
    ours = of_x * 1.5 + of_memory[0] * estimates[1] + of_memory[1] * estimates[0] + of_estimate * estimates[2]
    # Lu et al. 2022, 2211.01095, the exact solution of the SDE in mean: the integral over lambda by a fine sum.
    steps = torch.linspace(math.log(sigma), math.log(following), 200_001, dtype=torch.float64)
    middle = (steps[1:] + steps[:-1]) / 2
    curve = 0.7 - 0.4 * middle + 0.3 * middle**2
    weights = 2 * (2 * (math.log(following) - middle)).exp() * (math.log(sigma) - math.log(following)) / 200_000
    exact = (following / sigma) ** 2 * 1.5 + float((weights * curve).sum())
    assert ours == pytest.approx(exact, rel=1e-6)


def test_both_stages_of_the_stochastic_solver_see_one_path() -> None:
    """What x has gained over both stages has the variance of the whole step, and the covariance of one path."""
    levels = torch.tensor([4.0, 1.0], dtype=torch.float64)
    first, second = dpmpp_sde(levels).noise
    carried = dpmpp_sde(levels).matrices[1, 0, 2] * first[2]
    up = 1.0 * math.sqrt(1 - (1.0 / 4.0) ** 2)
    assert float(carried**2 + second[0] ** 2) == pytest.approx(up**2)
    assert float(carried / up) == pytest.approx(math.sqrt((4.0 - 2.0) / (4.0 - 1.0)))


def test_mixed_batch_equals_solo_runs() -> None:
    plans = [
        make_plan(COSINE, "ddim", 8),
        make_plan(COSINE, "ddim", 5, eta=0.7),
        make_plan(COSINE, "ddpm", 11),
        make_plan(COSINE, "euler_karras", 8),
        make_plan(COSINE, "euler_a", 3),
        make_plan(COSINE, "dpmpp_2m", 9),
        make_plan(COSINE, "dpmpp_2m_karras", 12, strength=0.5),
        *(make_plan(COSINE, sampler, 4) for sampler in SAMPLERS),
    ]
    seeds = list(range(7, 7 + len(plans)))
    together = run(plans, seeds)
    assert len(together) == 11
    for image, plan in enumerate(plans):
        alone = run(plan, [seeds[image]], images=[image])
        assert len(alone) == len(plan)
        for row, x in enumerate(alone):
            assert torch.equal(together[row][image], x[0])
        assert torch.equal(together[-1][image], alone[-1][0])  # and it stays as it was


def test_call_tells_the_network_where_each_image_stands() -> None:
    plans, calls = [make_plan(COSINE, "euler", 2), make_plan(COSINE, "dpmpp_2m", 3)], []

    def denoise(x: Tensor, call: Call) -> Tensor:
        calls.append(call)
        assert len(x) == len(call.images)
        return torch.zeros_like(x)

    steps = list(sample(denoise, plans, torch.ones(2, *SHAPE)))
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert [call.index for call in calls] == [0, 1, 2]
    assert [call.images.tolist() for call in calls] == [[0, 1], [0, 1], [1]]
    assert [call.rows.tolist() for call in calls] == [[0, 0], [1, 1], [2]]
    assert calls[1].timesteps.tolist() == [float(plan.timesteps[1]) for plan in plans]
    torch.testing.assert_close(calls[2].sigmas, plans[1].sigmas[2:].float())


def test_steps_already_yielded_do_not_change() -> None:
    plans = [make_plan(COSINE, "euler_a", 4), make_plan(COSINE, "dpmpp_2m", 6)]
    generators = [image_generator(seed) for seed in (0, 1)]
    kept = []
    for step in sample(
        as_denoiser(network, "v_prediction"), plans, start(plans, draw_noise(generators, SHAPE)), generators
    ):
        kept.append((step, step.x.clone(), step.denoised.clone()))
    for step, x, denoised in kept:
        assert torch.equal(step.x, x) and torch.equal(step.denoised, denoised)


def test_noise_belongs_to_the_image() -> None:
    """Image i of seed s draws from a generator seeded s + i, whatever else is in the batch."""
    four = draw_noise([image_generator(7 + i) for i in range(4)], SHAPE)
    assert four.dtype == torch.float32
    for i in range(4):
        assert torch.equal(four[i], torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(7 + i)))
    plan = make_plan(COSINE, "euler_a", 5)
    assert torch.equal(run(plan, [7, 8, 9])[-1][2], run(plan, [9], images=[2])[-1][0])


def test_threads_share_a_plan() -> None:
    plan, results = make_plan(COSINE, "dpmpp_2m", 10), {}
    expected = run(plan, [1, 2])[-1]

    def work(name: int) -> None:
        results[name] = run(plan, [1, 2])[-1]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results.values())


@pytest.mark.parametrize("sampler", [*SAMPLERS, "euler_karras", "dpmpp_2m_karras", "heun_exponential", "unipc_beta"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_float32_is_accurate_at_the_huge_first_sigmas(sampler: str, zero_snr: bool) -> None:
    """The tables reach sigma 2e4 under cosine, 1e9 at zero terminal SNR; x in VP coordinates stays right to 1e-5."""
    if sampler == "plms" and zero_snr:
        pytest.skip("differences of noise estimates at infinite noise mean nothing")
    # Those that extrapolate slopes take a small difference times the huge first step.
    tolerance = 1e-3 if sampler in ("heun", "dpm2", "dpm2_a", "plms", "heun_exponential") else 1e-5
    schedule = replace(COSINE, rescale_betas_zero_snr=zero_snr)
    plan, runs = make_plan(schedule, sampler, 20), []
    for dtype in (torch.float32, torch.float64):
        generators = [image_generator(0)]
        x = start(plan, draw_noise(generators, SHAPE).to(dtype))
        runs.append([step.x.double() for step in sample(as_denoiser(network, "v_prediction"), plan, x, generators)])
    for single, double, sigma in zip(*runs, [*plan.sigmas[1:].tolist(), 0.0]):
        scale = (1 + sigma**2) ** 0.5
        torch.testing.assert_close(single / scale, double / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_learned_variance_has_the_fixed_ones_as_its_ends(variance: str) -> None:
    learned, fixed = (replace(COSINE, variance_type=name) for name in ("learned_range", variance))
    share = -1.0 if variance == "fixed_small" else 1.0

    def twice(x: Tensor, call: Call) -> Tensor:
        return torch.cat([network(x, call), torch.full_like(x, share)], dim=1)

    generators = [[image_generator(0)] for _ in range(2)]
    plans = [make_plan(schedule, "ddpm", 7) for schedule in (learned, fixed)]
    x = start(plans[0], torch.ones(1, *SHAPE))
    *_, ours = sample(as_denoiser(twice, "v_prediction"), plans[0], x, generators[0])
    *_, expected = sample(as_denoiser(network, "v_prediction"), plans[1], x, generators[1])
    torch.testing.assert_close(ours.x, expected.x, atol=1e-5, rtol=1e-5)
    *_, other = sample(as_denoiser(twice, "v_prediction"), make_plan(learned, "dpmpp_2m", 7), x)  # the rest is left out
    *_, plain = sample(as_denoiser(network, "v_prediction"), make_plan(fixed, "dpmpp_2m", 7), x)
    assert torch.equal(other.x, plain.x)


def test_self_conditioning_gives_the_estimate_before() -> None:
    """Each image is given its own, in batches whose images end at different rows too; the first call gets zeros."""
    plans, given = [make_plan(COSINE, "dpmpp_2m", 4), make_plan(COSINE, "ddim", 6)], []

    def conditioned(inputs: Tensor, call: Call) -> Tensor:
        x, estimate = inputs.chunk(2, dim=1)
        given.append(estimate)
        return network(x, call) + 0.3 * estimate

    denoise = as_denoiser(conditioned, "v_prediction", self_conditioning=True)
    x = start(plans, draw_noise([image_generator(0), image_generator(1)], SHAPE))
    estimates = [step.denoised for step in sample(denoise, plans, x)]
    assert not given[0].any()
    for row in range(1, 6):
        assert torch.equal(given[row], estimates[row - 1][[0, 1] if row < 4 else [1]])


def test_resampling_takes_every_step_several_times() -> None:
    """At eta 0 on a network that always gives the same estimate, x keeps the variance that its level has."""
    once, thrice = (make_plan(COSINE, "dpmpp_2m", 5, resampling=times) for times in (1, 3))
    assert len(thrice) == 15 and torch.equal(thrice.timesteps, once.timesteps.repeat_interleave(3))
    assert torch.equal(thrice.matrices[2::3], once.matrices) and torch.equal(thrice.noise[2::3], once.noise)
    sigmas = [*once.sigmas.tolist(), 0.0]
    torch.testing.assert_close(thrice.noise[0::3, 0] ** 2, -torch.tensor(sigmas, dtype=torch.float64).square().diff())
    for sampler in ("heun", "dpmpp_sde", "unipc", "dpm2_a"):
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
    levels = COSINE.sampling_grid(8, SAMPLERS[sampler].rule).sigmas.tolist()
    by_hand = make_plan(COSINE, sampler, sigmas=levels[:-1] if sampler == "ddim" else levels)
    torch.testing.assert_close(by_hand.matrices, chosen.matrices)
    torch.testing.assert_close(by_hand.timesteps, chosen.timesteps, atol=1e-3, rtol=1e-6)


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


def test_steps_and_sigmas_exclude_each_other() -> None:
    with pytest.raises(InputError, match="either num_inference_steps or sigmas"):
        make_plan(COSINE, "euler")
    with pytest.raises(InputError, match="either num_inference_steps or sigmas"):
        make_plan(COSINE, "euler", 5, sigmas=[2.0, 1.0])
    with pytest.raises(InputError, match="sigmas are given, so euler_karras cannot space them; leave _karras out"):
        make_plan(COSINE, "euler_karras", sigmas=[2.0, 1.0])


def test_output_that_is_not_finite_is_an_error() -> None:
    plan = make_plan(COSINE, "ddim", 3)
    for value in (math.nan, math.inf):
        steps = sample(lambda x, call, value=value: torch.full_like(x, value), plan, torch.ones(1, *SHAPE))
        with pytest.raises(InputError, match="the network's output became NaN or infinite; use dtype float32"):
            list(steps)


def test_half_precision_x_is_raised() -> None:
    plan = make_plan(COSINE, "ddim", 3)
    *_, final = sample(lambda x, call: torch.zeros_like(x), plan, torch.ones(1, *SHAPE, dtype=torch.bfloat16))
    assert final.x.dtype == torch.float32


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


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, None, "7"])
def test_bad_seed(seed: Any) -> None:
    with pytest.raises(InputError, match=r"seed must be an integer from 0 to 2\^64 - 1"):
        image_generator(seed)


def test_bad_batches_are_refused_before_the_first_row() -> None:
    plan, x = make_plan(COSINE, "euler_a", 3), torch.ones(2, *SHAPE)
    denoise = as_denoiser(network, "v_prediction")
    with pytest.raises(InputError, match="needs one generator per image"):
        sample(denoise, plan, x)
    with pytest.raises(InputError, match="got 1 for 2 images"):
        sample(denoise, plan, x, [image_generator(0)])
    with pytest.raises(InputError, match="one plan per image is needed, got 3 for 2 images"):
        sample(denoise, [plan] * 3, x)


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


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_known_latents_come_out_as_they_are(sampler: str) -> None:
    """Half of the picture is known: it is reached exactly by every solver, and the rest is drawn to fit."""
    plan, generators = make_plan(COSINE, sampler, 12), [image_generator(0), image_generator(1)]
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(2, 1, *SHAPE[1:])
    mask[..., 2:] = 1
    denoise = as_denoiser(network, "v_prediction")
    x = start(plan, draw_noise(generators, SHAPE), latents)
    *_, final = sample(denoise, plan, x, generators, Known(mask, latents))
    atol = 0.02 if sampler == "deis" else 2e-3  # deis stops at the lowest trained noise level
    torch.testing.assert_close(final.x[..., :2], latents[..., :2], atol=atol, rtol=0)
    assert (final.x[..., 2:] - latents[..., 2:]).abs().mean() > 0.1


def test_a_mask_of_ones_changes_nothing() -> None:
    plan, generators = make_plan(COSINE, "dpmpp_2m", 6), [image_generator(0)]
    x = start(plan, draw_noise(generators, SHAPE))
    denoise = as_denoiser(network, "v_prediction")
    known = Known(torch.ones(1, 1, *SHAPE[1:]), torch.zeros(1, *SHAPE))
    *_, plain = sample(denoise, plan, x)
    *_, masked = sample(denoise, plan, x, known=known)
    torch.testing.assert_close(masked.x, plain.x)
    with pytest.raises(InputError, match=r"known latents must have the shape \(1, 2, 4, 4\) of x"):
        sample(denoise, plan, x, known=Known(known.mask, torch.zeros(2, *SHAPE)))
