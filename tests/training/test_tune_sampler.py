"""Tuning a sampler: four tuned steps come nearer than four of a formula, on data with a closed form and on a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from latentdiff.training.tune_sampler import Solver, Targets, targets_of, tune
from torch import Tensor

from latentdiff.checkpoints import load_pipeline
from latentdiff.diffusion import Call, draw_noise, image_generator, make_plan, sample, start
from latentdiff.diffusion.prediction import Denoise
from latentdiff.training import tune_sampler
from tests.diffusion.test_samplers import COSINE, gaussian_denoise, gaussian_solution

TRAINED, HELD_OUT = range(24), range(100, 112)
silently = partial(tune, report=lambda line: None)


def of_gaussian(seeds: Sequence[int]) -> Targets:
    """Return noise with what exact integration makes of it, for normally distributed data."""
    noise = draw_noise([image_generator(seed) for seed in seeds], (2, 4, 4))
    plan = make_plan(COSINE, "dpmpp_2m", 4)

    def denoise(x: Tensor, call: Call) -> Tensor:
        return gaussian_denoise(x, call.sigmas.to(x.dtype).reshape(-1, 1, 1, 1))

    return Targets(noise, gaussian_solution(start(plan, noise), float(plan.sigmas[0]), 0.0), lambda numbers: denoise)


def of_modes(seeds: Sequence[int]) -> Targets:
    """Return noise with what 200 steps make of it, for pixels from a mixture of N(-1, 0.3^2) and N(1, 0.3^2)."""
    noise = draw_noise([image_generator(seed) for seed in seeds], (1, 4, 4))

    def denoise(x: Tensor, call: Call) -> Tensor:
        of_noise = call.sigmas.to(x.dtype).reshape(-1, 1, 1, 1) ** 2
        both = of_noise + 0.3**2
        return 0.3**2 / both * x + of_noise / both * torch.tanh(x / both)

    plan = make_plan(COSINE, "dpmpp_2m_karras", 200)
    *_, last = sample(denoise, plan, start(plan, noise))
    return Targets(noise, last.x, lambda numbers: denoise)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gaussian_data(steps: int) -> None:
    """Its estimate is linear, so that even one step can be made exact."""
    table, initial = silently(COSINE, steps, of_gaussian(TRAINED), of_gaussian(HELD_OUT), iterations=150)
    formula = min(of_gaussian(HELD_OUT).distance(make_plan(COSINE, name, steps)) for name in tune_sampler.INITIAL)
    assert table.distance_before == pytest.approx(formula) and initial.startswith("dpmpp_2m")
    assert table.distance < 0.3 * formula
    assert of_gaussian(HELD_OUT).distance(table.plan()) == pytest.approx(table.distance)


def test_data_of_two_modes() -> None:
    table, _ = silently(COSINE, 4, of_modes(TRAINED), of_modes(HELD_OUT), iterations=150)
    assert table.distance < 0.8 * table.distance_before
    assert len(table) == 4 and [len(row) for row in table.of_estimates] == [1, 2, 3, 4]


def test_the_same_numbers_each_time() -> None:
    first, second = (
        silently(COSINE, 2, of_gaussian(TRAINED), of_gaussian(HELD_OUT), iterations=5)[0] for _ in range(2)
    )
    assert first == second


def test_never_worse_than_what_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned by two samples that are nothing like the others, the formula's own table is returned."""
    odd = of_gaussian(TRAINED[:2])
    monkeypatch.setattr(tune_sampler, "LEARNING_RATE", 0.5)
    table, initial = silently(
        COSINE, 3, Targets(odd.noise, odd.results + 5, odd.denoising), of_gaussian(HELD_OUT), iterations=20
    )
    assert table.distance == table.distance_before
    torch.testing.assert_close(table.plan().sigmas, make_plan(COSINE, initial, 3).sigmas)


@pytest.mark.parametrize("sampler", tune_sampler.INITIAL)
def test_a_solver_begins_as_the_formula(sampler: str) -> None:
    plan, targets = make_plan(COSINE, sampler, 5), of_modes(range(2))
    begun = Solver(plan, COSINE).table_of(1.0, 0.0, 0.0)
    torch.testing.assert_close(begun.plan().sigmas, plan.sigmas)
    torch.testing.assert_close(begun.plan().timesteps, plan.timesteps, rtol=0, atol=0.51)  # where those are rounded
    ends = []
    for one in (plan, begun.plan()):
        *_, last = sample(targets.denoising([0, 1]), one, start(one, targets.noise))
        ends.append(last.x)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def test_a_solver_draws_what_its_table_draws() -> None:
    """With numbers that are not those of the formula, the run that gradients go through is the one of the loop."""
    targets = of_modes(range(3))
    solver = Solver(make_plan(COSINE, "dpmpp_2m", 6), COSINE)
    with torch.no_grad():
        for number, parameter in enumerate(solver.parameters()):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    plan = solver.table_of(1.0, 0.0, 0.0).plan()
    *_, last = sample(targets.denoising([0, 1, 2]), plan, start(plan, targets.noise))
    torch.testing.assert_close(solver(start(plan, targets.noise), targets.denoising([0, 1, 2])), last.x)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_on_a_model_with_captions(built_model: Path, monkeypatch: pytest.MonkeyPatch, guidance: float) -> None:
    """Held-out noise and prompts; the teacher is the pipeline itself, and so are its results."""
    monkeypatch.setattr(tune_sampler, "TEACHER_STEPS", 16)
    components = load_pipeline(built_model)
    prompts = ["a fox", "red", "the cat", "x"]
    training, held_out = (targets_of(components, prompts, guidance, seed) for seed in (0, 100))
    denoise: Denoise = held_out.denoising(range(4))
    plan = make_plan(components.schedule, "dpmpp_2m", 16)
    with torch.no_grad():
        *_, last = sample(denoise, plan, start(plan, held_out.noise))
    torch.testing.assert_close(last.x, held_out.results, rtol=1e-3, atol=1e-3)
    table, _ = silently(components.schedule, 2, training, held_out, guidance, iterations=20)
    assert table.distance < table.distance_before and table.guidance_scale == guidance
