"""Several processes as one: which samples of a batch are whose, and what all of them have to agree on.

`run.batch_size` is the batch of one optimizer step over all processes and micro-steps. Samples, noise and timesteps are
those of the whole batch, of which each process takes its share, so that the number of processes changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from latentdiff.devices import resolve_device
from latentdiff.diffusion import draw_noise
from latentdiff.errors import InputError

from ..config import RunConfig
from .run import mixed_precision, seeded
from .sharding import shards_weights

LONGEST_WAIT = timedelta(days=2)  # of processes for one another


def start_accelerator(run: RunConfig) -> Accelerator:
    """Join the other processes that `accelerate launch` started, if any.

    Raises:
        InputError: the batch cannot be shared out evenly, or more than batch and weights are to be shared out.
    """
    on_cpu = resolve_device(None).type == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    # One process encodes the pictures while the others wait for it, which may take hours; NCCL gives up after minutes.
    state = PartialState(cpu=on_cpu, **InitProcessGroupKwargs(timeout=LONGEST_WAIT).to_kwargs())
    accelerator = Accelerator(mixed_precision=mixed_precision(run, state.device), cpu=on_cpu)
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        raise InputError(f"accelerate was told to use {kind.value}, and training knows MULTI_GPU and FSDP only")
    shares = accelerator.num_processes * run.accumulation
    if run.batch_size % shares:
        raise InputError(
            f"run.batch_size must be a multiple of processes x run.accumulation = {accelerator.num_processes} x "
            f"{run.accumulation}, got {run.batch_size}; try {max(1, run.batch_size // shares) * shares}"
        )
    return accelerator


def leave() -> None:
    """Wait for the other processes, if any, and take leave of them, as the last thing that a process does.

    One that ends while threads of its process group still run is aborted, and the launcher then ends the others.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def own_shares(accelerator: Accelerator, run: RunConfig) -> list[slice]:
    """Return the positions in the batch that each micro-step of this process goes through."""
    share = run.batch_size // accelerator.num_processes
    size, first = share // run.accumulation, accelerator.process_index * share
    return [slice(start, start + size) for start in range(first, first + share, size)]


def micro_batches(accelerator: Accelerator, run: RunConfig, step: int, *networks: nn.Module) -> Iterator[slice]:
    """Yield the positions in the batch that this process goes through, micro-step by micro-step.

    The gradients of all processes meet in the last one; where weights are sharded in each, because each process would
    keep whole gradients until then. What networks draw by themselves (dropout) is made a function of seed, step and
    position, so that a resumed run draws the same.

    Args:
        networks: prepared by the accelerator.
    """
    for number, positions in enumerate(own_shares(accelerator, run)):
        with ExitStack() as apart:
            if number < run.accumulation - 1 and not shards_weights(accelerator):
                for network in networks:
                    apart.enter_context(accelerator.no_sync(network))
            torch.manual_seed(seeded(run.seed, step, 2, positions.start).initial_seed())
            yield positions


def sample_noise(
    seed: int, step: int, positions: slice, batch_size: int, shape: Sequence[int], purpose: int = 1
) -> Tensor:
    """Draw the noise of some samples of a step's batch, each from a generator of its own: (B, *shape) float32, CPU.

    Args:
        positions: of the samples in the batch.
        shape: of one sample, (C, H, W).
        purpose: a number for each kind of noise, so that they differ; 0 and 2 are taken.
    """
    return draw_noise([seeded(seed, step, purpose, position) for position in range(batch_size)[positions]], shape)


def gathered(accelerator: Accelerator, micro_steps: Sequence[Tensor]) -> Tensor:
    """Join what each micro-step of each process has of its samples, each (b, ...): (B, ...), in the batch's order."""
    return accelerator.gather(torch.cat([part.detach() for part in micro_steps]))


def averaged(accelerator: Accelerator, micro_steps: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each scalar over the micro-steps of all processes."""
    values = torch.stack([torch.stack([*step.values()]).detach().float() for step in micro_steps])  # (steps, names)
    return dict(zip(micro_steps[0], accelerator.reduce(values.mean(dim=0), "mean")))


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Say whether the flag is set in at least one process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum"))
