"""The consistency loss on data with a closed form: the map along the path has none, the plain estimate has some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latentdiff.training.config import ConsistencyConfig
from latentdiff.training.data.batches import Batch
from latentdiff.training.losses.consistency import Teacher, consistency_terms
from torch import Tensor

from latentdiff.checkpoints import Encoders
from latentdiff.diffusion import NoiseSchedule
from tests.diffusion.test_samplers import MEAN, STD, gaussian_denoise, gaussian_solution

SCHEDULE = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample")
COMPONENTS: Any = type("Components", (Encoders,), {"__init__": lambda self: None})()
object.__setattr__(COMPONENTS, "schedule", SCHEDULE)
COUNT = 32


def in_sigma(noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and its noise levels from what a network is given."""
    sigmas = SCHEDULE.sigma_at(timesteps, noisy)
    return noisy * (1 + sigmas**2).sqrt(), sigmas


def estimate(noisy: Tensor, timesteps: Tensor, context: Tensor, **more: Any) -> Tensor:
    """The exact x0 estimate, moved by what the text says."""
    return gaussian_denoise(*in_sigma(noisy, timesteps)) + context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)


def end_of_path(noisy: Tensor, timesteps: Tensor, context: Tensor, **more: Any) -> Tensor:
    """The exact end of the path of the unguided model, from any of its points."""
    x, sigmas = in_sigma(noisy, timesteps)
    return torch.stack([gaussian_solution(one, float(sigma), 0.0) for one, sigma in zip(x, sigmas)])


def batch(text: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = MEAN + STD * torch.randn(COUNT, 2, 4, 4, generator=generator)
    return Batch(latents, torch.full((COUNT, 3, 5), text), torch.zeros(COUNT, dtype=torch.bool))


def loss(student: Any, done: float, text: float = 0.0, **asked: Any) -> Tensor:
    given: Any = estimate
    teacher = Teacher(given, torch.zeros(1, 3, 5), {}, ConsistencyConfig(**asked))
    noise = torch.randn(COUNT, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    timesteps = torch.linspace(30, 999, COUNT).long()
    terms = consistency_terms(student, teacher, COMPONENTS, batch(text), timesteps, noise, done)
    return terms["consistency"]


def test_the_end_of_the_path_is_the_same_from_both_neighbours() -> None:
    """But for the length of the teacher's step, which is of first order."""
    exact, plain = (loss(student, 0.99, guidance_scale=1.0, skip=5) for student in (end_of_path, estimate))
    assert exact.shape == (COUNT,) and exact.max() < 0.004
    assert exact.mean() < 0.2 * plain.mean()
    assert loss(end_of_path, 0.99, guidance_scale=1.0, skip=2).mean() < 0.6 * exact.mean()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_at_first_the_guided_estimate_itself_is_learnt(scale: float) -> None:
    def guided(noisy: Tensor, timesteps: Tensor, context: Tensor, **more: Any) -> Tensor:
        return estimate(noisy, timesteps, scale * context)

    assert loss(guided, 0.0, text=0.7, guidance_scale=scale).max() < 1e-6
    assert loss(guided, 0.0, text=0.9, guidance_scale=scale + 1).min() > 0.5


def test_gradients_go_through_the_student_alone() -> None:
    shift = torch.zeros((), requires_grad=True)
    calls = []

    def student(noisy: Tensor, timesteps: Tensor, context: Tensor, **more: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return estimate(noisy, timesteps, context) + shift

    loss(student, 0.5, guidance_scale=1.0).mean().backward()
    assert calls == [False, True] and shift.grad is not None and shift.grad.abs() > 0
