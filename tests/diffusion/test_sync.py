"""Inside the loop nothing reads a value back from the device, which would make a GPU wait at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff.diffusion import (
    SAMPLERS,
    KnownRegion,
    as_denoiser,
    draw_noise,
    image_generator,
    make_plan,
    sample,
    start,
)
from latentdiff.errors import InputError
from tests.diffusion.test_samplers import COSINE, SHAPE, network

READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item", "unique")


class NoReading(TorchDispatchMode):
    """Fail at every operation whose result Python or the shape of a tensor depends on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("known", [False, True])
def test_no_row_of_any_sampler_waits(known: bool) -> None:
    """Of a batch of all samplers, whose images end at different rows, with the rows' results left alone."""
    plans = [make_plan(COSINE, sampler, 3 + number % 4) for number, sampler in enumerate(SAMPLERS)]
    generators = [image_generator(seed) for seed in range(len(plans))]
    x = start(plans, draw_noise(generators, SHAPE))
    mask = torch.ones(len(plans), 1, *SHAPE[1:])
    denoise = as_denoiser(network, "v_prediction", limit=20.0)
    steps = sample(denoise, plans, x, generators, KnownRegion(mask, torch.zeros_like(x)) if known else None)
    total = next(steps).total
    with NoReading():
        for _ in range(total - 1):
            next(steps)
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoReading():
        list(steps)  # what is drawn is looked at once, at the end


def test_what_is_looked_at_is_that_the_result_is_finite() -> None:
    steps = sample(lambda x, call: x * torch.nan, make_plan(COSINE, "ddim", 2), torch.ones(1, *SHAPE))
    next(steps), next(steps)
    with pytest.raises(InputError, match="NaN or infinite"):
        next(steps)
