"""Tables of a model's own: what they draw, what image-to-image makes of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion import Call, NoiseSchedule, draw_noise, image_generator, make_plan, sample, start
from latentdiff.diffusion.tuned import HISTORY, TunedSampler, TunedTable, schedule_digest
from latentdiff.errors import InputError
from tests.diffusion.test_samplers import COSINE, network

WHOLE: dict[str, Any] = {
    "sigmas": (20.0, 3.0, 0.9, 0.2, 0.05),
    "timesteps": (990.0, 700.5, 400.0, 90.0, 30.0),
    "of_x": (0.15, 0.3, 0.2, 0.25, 0.0),
    "of_estimates": ((0.85,), (1.0, -0.3), (1.2, -0.5, 0.1), (1.0, -0.4, 0.2, -0.05), (1.1, -0.1, 0.02, -0.01)),
    "guidance_scale": 4.0,
    "distance": 0.1,
    "distance_before": 0.3,
}


def denoise(x: Tensor, call: Call) -> Tensor:
    return network(x / (1 + call.sigmas.reshape(-1, 1, 1, 1) ** 2).sqrt(), call)


def by_hand(table: TunedTable, noise: Tensor, first: int = 0, x: Tensor | None = None) -> Tensor:
    """Apply a table from a step on, the oldest estimate standing in for those that are missing."""
    x = noise * (1 + table.sigmas[first] ** 2) ** 0.5 if x is None else x
    estimates: list[Tensor] = []
    images = torch.arange(len(noise))
    for index in range(first, len(table)):
        given = [torch.full((len(noise),), value) for value in (table.sigmas[index], table.timesteps[index])]
        call = Call(index - first, images, torch.full_like(images, index - first), *given)
        estimates.append(denoise(x, call))
        x = table.of_x[index] * x
        for place, factor in enumerate(table.of_estimates[index]):
            x = x + factor * estimates[max(len(estimates) - 1 - place, 0)]
    return x


def test_a_table_is_the_recurrence_that_it_says() -> None:
    table = TunedTable(**WHOLE)
    noise = draw_noise([image_generator(seed) for seed in (1, 2)], (2, 3, 3))
    *_, last = sample(denoise, table.plan(), start(table.plan(), noise))
    torch.testing.assert_close(last.x, by_hand(table, noise), rtol=1e-4, atol=1e-4)
    assert last.total == 5 and table.plan().matrices.shape == (5, HISTORY, HISTORY + 1)


def test_image_to_image_begins_in_the_middle() -> None:
    """Estimates that are not there yet are stood in for, so that factors still add up to what they did."""
    table = TunedTable(**WHOLE)
    plan = table.plan(strength=0.6)
    noise = draw_noise([image_generator(3)], (2, 3, 3))
    *_, last = sample(denoise, plan, start(plan, noise, torch.ones_like(noise)))
    torch.testing.assert_close(last.x, by_hand(table, noise, 2, 1 + 0.9 * noise), rtol=1e-4, atol=1e-4)
    for index, row in enumerate(plan.matrices[:, 0, 1:]):
        assert float(row.sum()) == pytest.approx(sum(table.of_estimates[2 + index]))


def test_one_step() -> None:
    single = replace(TunedTable(**WHOLE), sigmas=(9.0,), timesteps=(999.0,), of_x=(0.01,), of_estimates=((0.99,),))
    assert single.plan().matrices.tolist() == [[[0.01, 0.99]]]
    with pytest.raises(InputError, match="strength must leave at least one of 1 steps"):
        single.plan(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": ()}, "sigmas must be 1 to 32 numbers, got 0"),
        ({"sigmas": (20.0, 3.0, 3.0, 0.2, 0.05)}, "sigmas must fall and stay above 0"),
        ({"sigmas": (20.0, 3.0, 0.9, 0.2, 0.0)}, "sigmas must fall and stay above 0"),
        ({"timesteps": (990.0, 700.5)}, "timesteps must be 5, one a step, got 2"),
        ({"timesteps": (990.0, 700.5, 400.0, 90.0, -1.0)}, "timesteps not be below it"),
        ({"of_x": (0.15, 0.3, 0.2, 0.25, float("nan"))}, "must be numbers within 1e"),
        ({"of_x": (0.15, 0.3, 0.2, 0.25, True)}, "must be numbers within 1e"),
        ({"of_x": (0.15, 0.3, 0.2, 0.25, "0")}, "must be numbers within 1e"),
        ({"of_x": (0.15, 0.3, 0.2, 0.25, 1e9)}, "must be numbers within 1e"),
        (
            {"of_estimates": ((0.85, 0.1), *WHOLE["of_estimates"][1:])},
            r"of_estimates\[0\] must be 1 to 1 numbers, got 2",
        ),
        ({"of_estimates": (*WHOLE["of_estimates"][:4], ())}, r"of_estimates\[4\] must be 1 to 4 numbers, got 0"),
        ({"guidance_scale": float("inf")}, "must be numbers within 1e"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TunedTable(**{**WHOLE, **changes})


def test_only_the_step_counts_that_are_there_and_the_process_it_was_tuned_for() -> None:
    table = TunedTable(**WHOLE)
    found = TunedSampler(schedule_digest(COSINE), {}).with_table(table)
    assert found.table(COSINE, 5) is table
    # Where sampling starts and ends is for the formulas, not for a table.
    assert found.table(replace(COSINE, timestep_spacing="leading", steps_offset=1), 5) is table
    with pytest.raises(InputError, match="takes 5 steps, got 4; choose those, or dpmpp_2m"):
        found.table(COSINE, 4)
    for other in (NoiseSchedule(prediction_type="v_prediction"), replace(COSINE, prediction_type="sample")):
        with pytest.raises(InputError, match="made for another noise schedule or prediction"):
            found.table(other, 5)


def test_the_name_is_no_formula() -> None:
    with pytest.raises(InputError, match="sampler 'tuned' is unknown"):
        make_plan(COSINE, "tuned", 5)
