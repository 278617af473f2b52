"""What fits into the time: arithmetic, without a network or a clock."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from latentdiff.training.speedrun import table
from latentdiff.training.speedrun.plan import (
    Costs,
    choose,
    needed,
    pictures_of_metric,
    plan,
    steps_that_fit,
    worth_changing,
)
from latentdiff.training.speedrun.table import LATENTS, Work

from latentdiff.errors import InputError

WORK = Work(pictures=3000, views=2, captions=10_000)
SMALL, MIDDLE, LARGE, HUGE = LATENTS
# About those of two cores of 2024, by size.
COSTS = {
    SMALL.name: Costs(0.01, 0.004, 0.001, 0.004),
    MIDDLE.name: Costs(0.04, 0.0125, 0.004, 0.004),
    LARGE.name: Costs(0.1, 0.0125, 0.01, 0.004),
    HUGE.name: Costs(0.5, 0.1, 0.05, 0.004),
}
WORKS = dict.fromkeys(COSTS, WORK)


@pytest.mark.parametrize(("minutes", "size"), [(30, SMALL), (120, MIDDLE), (480, LARGE), (10_000, LARGE)])
def test_the_largest_size_that_fits_is_chosen(minutes: float, size: table.Size) -> None:
    assert choose([SMALL, MIDDLE, LARGE], COSTS, WORKS, 60 * minutes) is size


def test_too_little_time_says_how_much_would_do() -> None:
    with pytest.raises(
        InputError, match=r"3 minutes are too few here: the smallest model, latents of 32 px, needs"
    ) as e:
        choose([SMALL, MIDDLE], COSTS, WORKS, 120.0, spent=60.0)
    minutes = int(re.findall(r"--minutes (\d+)", str(e.value))[0])
    assert choose([SMALL, MIDDLE], COSTS, WORKS, 60.0 * minutes - 60.0, spent=60.0) is SMALL
    with pytest.raises(InputError):
        choose([SMALL], COSTS, WORKS, 60.0 * (minutes - 1) - 60.0, spent=60.0)


@pytest.mark.parametrize("size", LATENTS)
@pytest.mark.parametrize("factor", [1.0, 1.7, 10.0])
def test_a_plan_ends_in_time_and_sees_the_least_samples(size: table.Size, factor: float) -> None:
    costs, spent = COSTS[size.name], 100.0
    left = factor * needed(size, costs, WORK)
    found = plan(size, costs, WORK, spent, spent + left, batch=12)
    first, over, total = found.ends["autoencoder"], found.ends["unet"], found.ends["evaluation"]
    assert spent < first < over < total == spent + left
    preparing = table.STARTING + costs.preparing(WORK)
    assert spent + preparing + found.autoencoder_steps * 12 * costs.autoencoder <= first + 1e-6
    grids = table.GRIDS * table.PROMPTS * table.DRAWING
    assert first + (found.unet_steps * found.unet_batch + grids) * costs.unet <= over + 1e-6
    most = table.MOST_SPARE + table.MOST_DRAWN * table.DRAWING * costs.unet
    assert min(0.09 * (left - preparing), 0.9 * most) < total - over <= most
    assert found.autoencoder_steps * 12 > size.least_autoencoder - 12.01
    assert (
        found.unet_steps * found.unet_batch > min(size.least, found.most * found.unet_batch) - found.unet_batch - 0.01
    )


def test_few_pictures_are_not_seen_more_often_than_makes_sense() -> None:
    work, costs = Work(100, 2, 100), Costs(0.0, 0.005, 0.001, 0.004)
    found = plan(table.of_embedded(64), costs, work, 0.0, 8 * 3600.0)
    assert found.autoencoder_steps == 0 and found.unet_batch == 32
    assert found.unet_steps == found.most == math.ceil(100 * table.PASSES[True] / 32)
    three = plan(table.of_embedded(64), costs, replace(work, pictures=3), 0.0, 8 * 3600.0)
    assert three.unet_steps == table.LEAST_STEPS


def test_a_short_run_has_small_batches() -> None:
    costs, work = Costs(0.0, 0.1, 0.01, 0.02), Work(100, 2, 100)
    batches = [plan(table.of_embedded(64), costs, work, 0.0, minutes * 60.0).unet_batch for minutes in (12, 60)]
    assert batches == [16, 32]


def test_steps_become_more_or_fewer_until_the_rate_falls() -> None:
    change = {"decay_share": 0.5, "most": 10_000}
    assert steps_that_fit(100, 1000, pace=1.0, left=400.0, **change) == 500
    assert steps_that_fit(100, 1000, pace=0.5, left=900.0, **change) == 1900
    assert steps_that_fit(600, 1000, pace=0.5, left=900.0, **change) == 1000
    assert steps_that_fit(600, 1000, pace=4.0, left=400.0, **change) == 700
    assert steps_that_fit(600, 1000, pace=4.0, left=-50.0, **change) == 601  # late: one more, with next to no rate
    assert steps_that_fit(100, 1000, pace=0.1, left=1e6, **change) == 10_000


def test_a_plan_is_changed_where_it_matters() -> None:
    assert worth_changing(250, 1000, 500, pace=1.0, decay_share=0.5)
    assert not worth_changing(250, 1000, 950, pace=1.0, decay_share=0.5)
    assert not worth_changing(250, 1000, 500, pace=0.01, decay_share=0.5)  # some seconds
    assert not worth_changing(200, 1000, 500, pace=1.0, decay_share=0.5)  # the rate is constant until step 250
    assert not worth_changing(400, 1000, 2000, pace=1.0, decay_share=0.5)
    assert worth_changing(499, 1000, 2000, pace=1.0, decay_share=0.5)


def test_as_many_pictures_are_measured_as_time_and_pictures_allow() -> None:
    assert pictures_of_metric(100.0, 1.0, sets=2, there=1000) == 50
    assert pictures_of_metric(1e6, 1.0, sets=2, there=1000) == 200
    assert pictures_of_metric(1e6, 1.0, sets=2, there=30) == 30
    assert pictures_of_metric(-5.0, 1.0, sets=2, there=1000) == 8
