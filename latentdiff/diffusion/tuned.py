"""Tuned samplers: a solver all of whose numbers were chosen for one model, so that few steps come near to many.

A formula for a solver (`samplers.py`) knows nothing of the network. Of a model, noise levels, the timesteps that the
network is told, and the factors of x and of the estimates can be chosen by gradient (`training/tune_sampler.py`); what
comes out is a table as any other.

Source: Watson et al. 2022, arXiv 2202.05830 (samplers optimised by gradient through the network); Tong et al. 2024,
arXiv 2405.15506 (noise levels, and timesteps apart from them); Frankel et al. 2025, arXiv 2502.17423 (coefficients).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import pairwise

import torch

from latentdiff.diffusion.plan import Plan, skipped_steps
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError, shown

__all__ = ["HISTORY", "MOST_STEPS", "TUNED", "TunedSampler", "TunedTable", "schedule_digest"]

TUNED = "tuned"  # what settings call the sampler that a model has of its own
HISTORY = 4  # x0 estimates that a step may use, the newest included
MOST_STEPS = 32  # above, formulas are near enough
LARGEST = 1e6  # factor; noise levels of pure noise are some thousands
# What decides the noise process and the meaning of the network's output, to which a table belongs.
PROCESS = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr"),
    "prediction_type",
)


@dataclass(frozen=True)
class TunedTable:
    """A multistep solver of N steps with one call of the network each.

    With D_i the x0 estimate of step i, x becomes of_x[i] * x + the sum over j of of_estimates[i][j] * D_{i-j}; after
    the last step it is the result.

    Attributes:
        sigmas: N falling noise levels of x at the calls.
        timesteps: N, what the network is told of them.
        of_x: N factors.
        of_estimates: N rows, row i of at most min(i + 1, HISTORY) factors, that of the newest estimate first.
        guidance_scale: at which it was tuned.
        distance: of its results from those of many steps, root mean square over held-out noise.
        distance_before: the same of the solver that tuning began with.

    Raises:
        InputError: the numbers are not finite, do not fall, or are not as many as they should be.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    of_x: tuple[float, ...]
    of_estimates: tuple[tuple[float, ...], ...]
    guidance_scale: float
    distance: float
    distance_before: float

    def __post_init__(self) -> None:
        count = len(self.sigmas)
        if not 1 <= count <= MOST_STEPS:
            raise InputError(f"sigmas must be 1 to {MOST_STEPS} numbers, got {count}; tune it again")
        single = (self.guidance_scale, self.distance, self.distance_before)
        numbers = [*self.sigmas, *self.timesteps, *self.of_x, *(one for row in self.of_estimates for one in row)]
        for number in (*numbers, *single):
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LARGEST:
                raise InputError(f"all of it must be numbers within {LARGEST:g}, got {shown(number)}; tune it again")
        for name in ("timesteps", "of_x", "of_estimates"):
            if len(getattr(self, name)) != count:
                raise InputError(f"{name} must be {count}, one a step, got {len(getattr(self, name))}; tune it again")
        if min(self.sigmas) <= 0 or min(self.timesteps) < 0 or not all(a > b for a, b in pairwise(self.sigmas)):
            raise InputError("sigmas must fall and stay above 0, and timesteps not be below it; tune it again")
        for index, row in enumerate(self.of_estimates):
            most = min(index + 1, HISTORY)
            if not 1 <= len(row) <= most:
                raise InputError(f"of_estimates[{index}] must be 1 to {most} numbers, got {len(row)}; tune it again")

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def digest(self) -> str:
        """A short hash of the numbers that decide what is drawn."""
        numbers = (self.sigmas, self.timesteps, self.of_x, self.of_estimates)
        return sha256(json.dumps(numbers).encode()).hexdigest()[:16]

    def plan(self, strength: float = 1.0) -> Plan:
        """Return the table of a sampling run.

        Args:
            strength: above 0, up to 1; image-to-image skips the first rows. Of the estimates that are missing then,
                the newest one that is there takes the factors.

        Raises:
            InputError: see `plan.skipped_steps`.
        """
        skipped = skipped_steps(len(self), strength)
        rows = [_within(row, most) for most, row in enumerate(self.of_estimates[skipped:], start=1)]
        memory = max(len(row) for row in rows) - 1
        matrices = torch.zeros(len(rows), memory + 1, memory + 2, dtype=torch.float64)
        for matrix, of_x, row in zip(matrices, self.of_x[skipped:], rows):
            newest, *earlier = row
            matrix[0, 0], matrix[0, -1] = of_x, newest
            matrix[0, 1 : 1 + len(earlier)] = torch.tensor(earlier, dtype=torch.float64)
            if memory:
                matrix[1, -1] = 1
                matrix[2:, 1:-2] = torch.eye(memory - 1, dtype=torch.float64)
        sigmas = torch.tensor(self.sigmas[skipped:], dtype=torch.float64)
        return Plan(
            timesteps=torch.tensor(self.timesteps[skipped:], dtype=torch.float64),
            sigmas=sigmas,
            matrices=matrices,
            noise=torch.zeros(len(rows), memory + 1, dtype=torch.float64),
            init_noise_sigma=math.hypot(1, self.sigmas[skipped]),
            noise_range=torch.zeros_like(sigmas),
        )


def _within(row: Sequence[float], most: int) -> list[float]:
    """Return factors for at most so many estimates, those of earlier ones given to the oldest that is there."""
    kept = list(row[:most])
    kept[-1] += sum(row[most:])
    return kept


@dataclass(frozen=True)
class TunedSampler:
    """What a model has of tuned tables.

    Attributes:
        schedule: `schedule_digest` of the model they are for.
        tables: by how many steps they take.
    """

    schedule: str
    tables: Mapping[int, TunedTable]

    def with_table(self, table: TunedTable) -> TunedSampler:
        """Return the same with another table, in place of one of as many steps."""
        return replace(self, tables=dict(sorted({**self.tables, len(table): table}.items())))

    def table(self, schedule: NoiseSchedule, steps: int) -> TunedTable:
        """Return the table of so many steps.

        Raises:
            InputError: there is none, or it is for another noise schedule or prediction than that of the model.
        """
        if steps not in self.tables:
            there = ", ".join(map(str, self.tables)) or "no number of"
            raise InputError(f"this model's tuned sampler takes {there} steps, got {steps}; choose those, or dpmpp_2m")
        if self.schedule != schedule_digest(schedule):
            raise InputError(
                "the tuned sampler was made for another noise schedule or prediction than this model's; tune it again "
                "with latentdiff distill, or choose dpmpp_2m"
            )
        return self.tables[steps]

    def to_dict(self) -> dict[str, object]:
        """Return the content of its file."""
        return {"schedule": self.schedule, "tables": [asdict(table) for table in self.tables.values()]}


def schedule_digest(schedule: NoiseSchedule) -> str:
    """Return a short hash of a noise process and of what is predicted, by which a table knows what it is for."""
    values = {name: getattr(schedule, name) for name in PROCESS}
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
