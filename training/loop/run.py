"""What every training loop shares: the run folder, precision, learning rate, stopping on a signal, logs and grids."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from latentdiff.errors import InputError, StorageError
from latentdiff.images import from_tensor
from latentdiff.models.attention import Transformer2DModel
from latentdiff.models.layers import ResnetBlock2D

from ..config import OptimizerConfig, RunConfig, TrainingConfig, completed
from .checkpointing import (
    Checkpoint,
    checkpoint_folders,
    config_differences,
    load_latest,
    remove_leftovers,
    save_checkpoint,
)
from .optimizers import require_optimizer
from .posthoc_ema import remove_snapshots
from .state import RunState

SHOWN_DIFFERENCES = 5  # of two configs, in a message


def open_run(config: TrainingConfig, resume: bool, accelerator: Accelerator) -> Checkpoint | None:
    """Make the run folder, write the resolved config into it and return the checkpoint to go on from.

    Raises:
        InputError: the folder has checkpoints and `resume` is not set, or they are of another config.
        MissingDependencyError: the config asks for a package that is not installed.
        StorageError: the folder cannot be written.
    """
    require_optimizer(config.optimizer)
    folder, tree = Path(config.run.out), config.model_dump(mode="json")
    found = checkpoint_folders(folder)
    if found and not resume:
        raise InputError(f"{folder} has a checkpoint, {found[0].name}; add --resume to go on, or choose another --out")
    newest = load_latest(folder, quiet=not accelerator.is_main_process)
    if newest is not None and (differences := config_differences(completed(newest.state["config"]), tree)):
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        more = len(differences) - SHOWN_DIFFERENCES
        raise InputError(
            f"{newest.folder} is of another config: {shown}{f' and {more} more' if more > 0 else ''}\n"
            "set these back to go on, or choose another --out"
        )
    if accelerator.is_main_process:
        try:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        except OSError as error:
            raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
        remove_leftovers(folder)
        remove_snapshots(folder, newest.step if newest else 0)
    return newest


def save_run(config: TrainingConfig, step: int, state: RunState, accelerator: Accelerator) -> None:
    """Write the checkpoint of `step`, from the main process; all have to call it.

    Raises:
        StorageError, InputError: see `save_checkpoint`.
    """
    tensors = state.tensors()
    if accelerator.is_main_process:
        counters = state.counters() | {"config": config.model_dump(mode="json")}
        save_checkpoint(Path(config.run.out), step, tensors, counters, config.run.keep_checkpoints)


def mixed_precision(run: RunConfig) -> str:
    """Return accelerate's name of the precision: "bf16" where matrix products are native in it, else "no".

    Raises:
        InputError: fp16 is asked for without a GPU.
    """
    if run.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("run.precision fp16 needs a CUDA GPU, and there is none; choose bf16 or no")
    if run.precision != "auto":
        return run.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if native() else "no"


def fast_attention() -> AbstractContextManager[None]:
    """Return a context in which attention is two matrix products on a CPU, 1.4x a whole step there; no change on a GPU.

    PyTorch's fused kernel saves memory but is slow backwards for the short sequences of small latents.
    """
    if torch.cuda.is_available():
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def compile_checked(module: nn.Module, *inputs: Tensor, autocast: AbstractContextManager[Any], **options: Any) -> None:
    """Compile a network in place, after seeing on a copy that it then gives the gradients it gives without.

    Some releases of PyTorch lose most gradients of a compiled U-Net on a CPU without a word; the loss hardly shows it.

    Args:
        inputs, options: an example of what the network will be called with.
        autocast: precision of the call.

    Raises:
        InputError: the gradients differ by more than rounding.
    """
    probe, gradients = copy.deepcopy(module), []
    for parameter in probe.parameters():
        if not parameter.any():  # layers that start at zero let no gradient through
            nn.init.normal_(parameter, std=0.02)
    with autocast:
        outputs = [probe(*inputs, **options)]
        probe.compile()
        outputs.append(probe(*inputs, **options))
    for output in outputs:
        probe.zero_grad()
        output.float().square().mean().backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in probe.parameters()]
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    difference = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    if not difference < 0.1:
        raise InputError(
            f"torch.compile of torch {torch.__version__} changes this network's gradients by {difference:.0%} here; "
            "set run.compile to false"
        )
    module.compile()


def checkpoint_gradients(network: nn.Module) -> None:
    """Keep only the inputs of each residual block and transformer for the backward pass, which computes the rest again.

    Source: Chen et al. 2016, arXiv 1604.06174, section 3.
    """
    for module in network.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step` of `steps`: linear warm-up, constant, cosine fall to zero."""
    warmup = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    start = steps * (1 - optimizer.decay_share)
    fall = 0.0 if step < start else (step - start) / max(1.0, steps - start)
    return optimizer.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * fall))


def start_step(config: TrainingConfig, step: int, *optimizers: Optimizer) -> None:
    """Set the learning rate of a step (0-based) and clear the gradients of the one before."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.run.steps)
        optimizer.zero_grad()


def seeded(*parts: int) -> torch.Generator:
    """Return a CPU generator that is a pure function of `parts` (seed, step, process, purpose)."""
    return torch.Generator().manual_seed(random.Random(repr(parts)).getrandbits(63))


def short(values: Tensor, most: int = 6) -> str:
    """Return numbers as messages have them, the first few: "[0.12, -1.00, ...]"."""
    more = ", ..." if len(values) > most else ""
    return f"[{', '.join(f'{value:.2f}' for value in values[:most].tolist())}{more}]"


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop looks at after each step; the second one exits at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            sys.exit(128 + number)
        received.append(number)
        # Not print: a signal that comes while something is being printed may not enter the same stream again.
        os.write(2, b"stopping after this step; a second signal exits at once\n")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def save_grid(images: Tensor | Sequence[Tensor], file: Path, columns: int, gap: int = 2) -> None:
    """Save images (N, 3, H, W) in [-1, 1] as one PNG, row by row on white."""
    pictures = from_tensor(torch.stack(list(images)))
    width, height = pictures[0].width + gap, pictures[0].height + gap
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, ((index % columns) * width, (index // columns) * height))
    sheet.save(file)
