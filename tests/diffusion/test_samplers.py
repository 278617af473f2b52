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
from torch.nn.functional import pad

from latentdiff.diffusion import (
    SAMPLERS,
    Call,
    NoiseSchedule,
    Plan,
    as_denoiser,
    classifier_free,
    draw_noise,
    guidance_scales,
    image_generator,
    make_plan,
    sample,
    start,
)
from latentdiff.diffusion.samplers import (
    ddim,
    ddpm,
    deis,
    dpm2,
    dpmpp_2m,
    dpmpp_2s,
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
        (dpmpp_2s, 2, 80),
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
    sigmas = COSINE.discretize(10).sigmas
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
    assert len(together) == max(map(len, plans))
    for image, plan in enumerate(plans):
        alone = run(plan, [seeds[image]], images=[image])
        assert len(alone) == len(plan)
        for row, x in enumerate(alone):
            assert torch.equal(together[row][image], x[0])
        assert torch.equal(together[-1][image], alone[-1][0])  # and it stays as it was


def test_images_of_a_batch_may_differ_in_sampler_steps_and_guidance() -> None:
    """Five of each, with text and noise of their own: every image is what it is alone."""
    samplers, counts = ("dpmpp_2m", "ddim", "euler_a", "heun", "unipc"), (12, 5, 9, 4, 7)
    scales = [1.0, 2.5, 4.0, 7.5, 12.0]
    plans = [make_plan(COSINE, sampler, steps) for sampler, steps in zip(samplers, counts)]
    levels = [guidance_scales(plan.sigmas, scale).float() for plan, scale in zip(plans, scales)]

    def drawn(images: list[int]) -> list[Tensor]:
        own, longest = torch.tensor(images), max(len(plans[image]) for image in images)
        table = torch.stack([pad(levels[image], (0, longest - len(levels[image]))) for image in images])  # (B, R)

        def guided(x: Tensor, call: Call) -> Tensor:
            renumbered = Call(call.index, own[call.images], call.rows, call.sigmas, call.timesteps)
            conditional = network(x, renumbered)
            return classifier_free(conditional, 0.5 * network(x.flip(1), renumbered), table[call.images, call.rows])

        generators = [image_generator(image) for image in images]
        chosen = [plans[image] for image in images]
        *_, final = sample(
            as_denoiser(guided, "v_prediction"), chosen, start(chosen, draw_noise(generators, SHAPE)), generators
        )
        return list(final.x)

    together = drawn([0, 1, 2, 3, 4])
    for image in range(5):
        torch.testing.assert_close(together[image], drawn([image])[0], atol=1e-5, rtol=0)


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
    if sampler == "pndm" or (sampler == "plms" and zero_snr):
        pytest.skip("differences of noise estimates at nearly infinite noise mean nothing")
    # Those that extrapolate slopes take a small difference times the huge first step.
    extrapolating = ("heun", "dpm2", "dpm2_a", "plms", "heun_exponential")
    tolerance = 1e-3 if sampler in extrapolating else 1e-5
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
