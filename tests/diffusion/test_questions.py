"""Sampling that leaves the calls of the network to its caller."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.diffusion import (
    Call,
    NoiseSchedule,
    Plan,
    Question,
    Step,
    as_denoiser,
    draw_noise,
    image_generator,
    make_plan,
    sample,
    sampling,
    start,
)

SCHEDULE = NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
RUNS = (("euler_a", 4), ("dpmpp_2m", 7), ("heun", 3))


def network(inputs: Tensor, call: Call) -> Tensor:
    return (inputs * call.sigmas.reshape(-1, 1, 1, 1)).tanh() - 0.3 * inputs


def never(inputs: Tensor, call: Call) -> Tensor:
    raise AssertionError


def begun(number: int) -> tuple[Plan, Tensor, list[torch.Generator]]:
    """Return plan, initial x and generator of a run."""
    plan, generator = make_plan(SCHEDULE, *RUNS[number]), image_generator(number)
    return plan, start(plan, draw_noise([generator], (4, 8, 8))), [generator]


def test_calls_of_several_runs_can_be_made_as_one() -> None:
    """Runs of other samplers and lengths, each at a row of its own: to the bit what each samples alone."""
    alone = [[step.x for step in sample(as_denoiser(network, "v_prediction"), *begun(n))] for n in range(len(RUNS))]
    runs = [sampling(as_denoiser(never, "v_prediction"), *begun(n)) for n in range(len(RUNS))]
    due = {number: next(run) for number, run in enumerate(runs)}
    drawn, sizes = [list[Tensor]() for _ in RUNS], list[int]()
    while due:
        questions = [item for item in due.values() if isinstance(item, Question)]
        calls = [question.call for question in questions]
        joined = Call(
            0,
            torch.cat([call.images for call in calls]),
            torch.cat([call.rows for call in calls]),
            torch.cat([call.sigmas for call in calls]),
            torch.cat([call.timesteps for call in calls]),
        )
        outputs = network(torch.cat([question.inputs for question in questions]), joined)
        sizes.append(len(outputs))
        for number, output in zip(list(due), outputs.split(1), strict=True):
            step = runs[number].send(output)
            assert isinstance(step, Step)
            drawn[number].append(step.x)
            following = next(runs[number], None)
            if following is None:
                del due[number]
            else:
                due[number] = following
    assert sizes == [3, 3, 3, 3, 2, 1, 1]
    assert all(torch.equal(*both) for pair in zip(drawn, alone, strict=True) for both in zip(*pair, strict=True))
