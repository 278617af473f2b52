"""Rows of `latentdiff train --check` for every stage: folder, pictures, memory, disk, cost of a step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.errors import InputError

from ..config import AutoencoderTraining, DiffusionTraining, TrainingConfig, completed
from ..data.dataset import CaptionedImages
from ..loop.checkpointing import checkpoint_folders, checkpoint_problem, config_differences
from ..loop.distributed import start_accelerator
from ..loop.optimizers import require_optimizer
from ..loop.resources import estimate_disk, estimate_memory, readable
from ..loop.run import EXPORTS, require_own_config, require_replaceable
from ..loop.sharding import shards_weights
from ..loop.state import RunState
from ..monitor.evaluation import load_tools, open_reference
from ..monitor.instruments import matrix_product_rate
from ..monitor.trackers import require_trackers

TIMED = 3  # steps, after one that is not
OVERFIT = 8  # samples of the self-test
OVERFIT_STEPS = 300
OVERFIT_RATE = 1e-3
OVERFIT_FLOPS = {"cpu": 1e13, "mps": 1e14, "cuda": 1e15}  # up to which it trains the network itself, not a reduced one


class Row(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    expected: str
    fine: bool = True


def start_check(config: TrainingConfig) -> Accelerator:
    """Return what the run would start with.

    Raises:
        InputError, MissingDependencyError: there are several processes, or the config asks for what is not there.
    """
    accelerator = start_accelerator(config.run)
    if accelerator.num_processes > 1 or shards_weights(accelerator):
        raise InputError("--check is for one process; start it without accelerate launch")
    require_optimizer(config.optimizer, accelerator.device)
    require_trackers(config.run.trackers)
    return accelerator


def examine_folder(config: TrainingConfig, what: str) -> Iterator[Row]:
    """Say what is trained and whether the run folder has been used."""
    yield Row("config", f"{config.stage}: {what}", "no unknown key, no wrong value")
    require_own_config(Path(config.run.out))
    for export in EXPORTS:
        require_replaceable(Path(config.run.out) / export)
    found, state = checkpoint_folders(Path(config.run.out)), "new"
    if found:
        state = f"{found[0].name}, {_problem(found[0], config) or 'whole and of this config'}"
    yield Row("run folder", f"{config.run.out}: {state}", "new, or whole and --resume", not found)


def _problem(checkpoint: Path, config: TrainingConfig) -> str:
    """Say what keeps a run from going on from a checkpoint, or return the empty string."""
    if problem := checkpoint_problem(checkpoint):
        return problem
    before = json.loads((checkpoint / "state.json").read_text())["config"]
    return "; ".join(config_differences(completed(before), config.model_dump(mode="json")))


def examine_pictures(config: TrainingConfig, images: CaptionedImages) -> Iterator[Row]:
    """Say how many pictures and captions there are, and which were left out."""
    run = config.run
    captions = sum(len(row["captions"]) for row in images.rows)
    passes = run.steps * run.batch_size / len(images)
    value = f"{len(images)} with {captions} captions, {passes:.1f} times each"
    yield Row("pictures", value, f"at least a batch, {run.batch_size}", len(images) >= run.batch_size)
    skipped = images.skipped
    names = ", ".join(str(one["name"]) for one in skipped)
    yield Row("skipped", f"{len(skipped)}: {names}"[:52] if skipped else "0", "0, at most 1 %", not skipped)


def examine_evaluation(config: AutoencoderTraining | DiffusionTraining, accelerator: Accelerator, cache: Path) -> Row:
    """Say what will be evaluated, how often, and what decides.

    Raises:
        InputError, MissingDependencyError, ModelLoadError: something that it needs is missing.
    """
    asked, held_out = config.evaluate, "held_out_psnr" if config.stage == "autoencoder" else "held_out/loss"
    load_tools(config, accelerator.device)
    reference = open_reference(config, cache)
    names = ", ".join([held_out, *asked.metrics])
    when = (
        f"every {asked.every} steps, {math.ceil(config.run.steps / asked.every)} times" if asked.every else "at the end"
    )
    if not asked.every and not asked.metrics:
        return Row("evaluation", "none", "evaluate.every and evaluate.metrics")
    pictures = f" of {len(reference)} held-out pictures" if reference is not None and asked.metrics else ""
    decides = "none kept as the best" if asked.keep_best is None else f"the best by {asked.keep_best} is kept"
    patience = f", patience {asked.patience}" if asked.patience else ""
    return Row("evaluation", f"{names}{pictures}", f"{when}; {decides}{patience}")


def examine_memory(
    networks: Sequence[nn.Module], state: RunState, accelerator: Accelerator, activations: int
) -> Iterator[Row]:
    """Say how many parameters there are and what they, gradients, optimizer, average and activations take.

    Args:
        networks: all that are in memory, those that are trained among them.
        activations: see `Memory`.

    Raises:
        InputError: that is more than the device has.
    """
    memory = estimate_memory(state, networks, accelerator.device, activations)
    yield Row("parameters", f"{memory.trained:,} trained", f"of {memory.parameters:,} in all", memory.trained > 0)
    more = f"{readable(activations)} of activations" if activations else "activations"
    expected = f"{readable(memory.needed)} and {more}, of {readable(memory.there)}"
    yield Row("memory", str(memory), expected, memory.needed + activations < 0.8 * memory.there)


def examine_disk(config: TrainingConfig, state: RunState) -> Row:
    """Say how large checkpoints will be and whether there is room for them.

    Raises:
        StorageError: there is not.
    """
    disk = estimate_disk(config.run, state)
    expected = f"{readable(disk.needed)} of {readable(disk.free)} free"
    return Row("disk", str(disk), expected, disk.needed < 0.8 * disk.free)


def small_enough(flops: int, config: TrainingConfig, accelerator: Accelerator) -> bool:
    """Say whether the self-test can train the network itself, a step of which takes so many FLOPs."""
    return flops / config.run.batch_size * OVERFIT * OVERFIT_STEPS < OVERFIT_FLOPS[accelerator.device.type]


def examine_steps(
    config: TrainingConfig, take_step: Callable[[int], Tensor], state: RunState, accelerator: Accelerator
) -> Generator[Row, None, int]:
    """Take a few steps, say what they cost, and return the FLOPs of one.

    Args:
        take_step: takes the step of a number, the first of which is 0, and returns the norm of its gradient.

    Raises:
        InputError: the gradient is not finite.
    """
    run, counter, seconds, norms = config.run, FlopCounterMode(display=False), [], []
    for step in range(1 + TIMED):
        began = time.perf_counter()
        with counter if step == 0 else nullcontext():
            norm = take_step(step)
        norms.append(float(norm))  # which waits for the device
        seconds.append(time.perf_counter() - began)
    if not all(map(math.isfinite, norms)) and state.scaler is None:
        raise InputError(f"the norms of the first gradients are {norms}; lower optimizer.learning_rate, or try bf16")
    took, flops = median(seconds[1:]), counter.get_total_flops()
    clipped = f"above 0, clipped at {config.optimizer.max_grad_norm:g}"
    yield Row("gradient norm", ", ".join(f"{norm:.3g}" for norm in norms), clipped, min(norms) > 0)
    compiled = ", less with run.compile" if run.compile else ""
    rate = f"{took:.3g} s, {run.batch_size / took:.3g} images/s"
    yield Row("step", rate, f"{run.steps} steps in {_duration(run.steps * took)}{compiled}")
    peak = matrix_product_rate(accelerator)
    share = f"{flops / took / peak:.0%} of what a matrix product reaches"
    yield Row("FLOPs of a step", f"{flops:.3g}, {flops / took:.3g} per second", share)
    return flops


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
